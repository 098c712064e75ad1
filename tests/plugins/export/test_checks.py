"""The conformance checks of exporters: those of the project pass, and each fault is found."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apt_core.modeling.plain import with_tensors
from apt_core.providers import ExporterProvider
from apt_core.testing.conformance import LeftOut, checks_of
from tests.plugins.export.own_exporter import NumpyExporter

EXPORTERS = {
    "hf": "apt_plugins.export.hf:HFExporter",
    "safetensors": "apt_plugins.export.plain_weights:PlainWeightsExporter",
    "onnx": "apt_plugins.export.onnx.exporter:ONNXExporter",
    "gguf": "apt_plugins.export.gguf.exporter:GGUFExporter",
}
ROUNDED = {"hf": {"dtype": "bfloat16"}, "gguf": {"type": "Q8_0"}}


def failed(exporter: Any) -> dict[str, str]:
    """What the checks find, by the name of the check."""
    found = {}
    for check in checks_of("exporter", exporter):
        try:
            check.run()
        except LeftOut as why:
            found[check.name] = f"left out: {why}"
        except Exception as error:
            found[check.name] = str(error)
    return found


@pytest.mark.parametrize("name", EXPORTERS)
def test_the_exporters_of_the_project_keep_what_every_exporter_promises(name: str) -> None:
    module, _, attribute = EXPORTERS[name].partition(":")
    if name in ("onnx", "gguf"):
        pytest.importorskip(name, reason="what writes the exports is not installed")
    made: type[ExporterProvider] = getattr(importlib.import_module(module), attribute)
    assert failed(made(ROUNDED.get(name))) == {}


class Faulty(NumpyExporter):
    """An exporter with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.asked = fault, 0

    def check(self, shape: Any, tokenizer: Any) -> Any:
        self.asked += 1
        if self.fault == "words":
            yield "no"
        if self.fault == "moods" and self.asked % 2:
            yield from super().check(replace(shape, num_experts=1), tokenizer)
        if self.fault == "refuses":
            yield from super().check(replace(shape, num_experts=1), tokenizer)

    def write(self, job: Any) -> None:
        if self.fault == "nothing":
            return
        super().write(job)
        if self.fault == "elsewhere":
            Path("log.txt").write_text("written")
        if self.fault == "link":
            (job.folder / "link").symlink_to("/etc/hostname")
        if self.fault == "scales":
            job.model.final_norm.weight.mul_(2)

    def stored(self, model: Any) -> Any:
        if self.fault == "loses":
            return with_tensors(model, lambda tensor: 0 * tensor)
        return None

    @property
    def proof(self) -> Any:
        proof = super().proof
        if self.fault == "script":
            return replace(proof, script=Path("none.py"))
        return replace(proof, tolerance=0.0) if self.fault == "tolerance" else proof


def test_each_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert failed(Faulty("none")) == {}
    for fault, check, told in (
        ("words", "refusals", "check gives a str"),
        ("moods", "refusals", "a second check of the same model gives other problems"),
        ("refuses", "files", "left out: it refuses the models that are tried"),
        ("nothing", "files", "it writes nothing"),
        ("elsewhere", "files", "it writes log.txt outside of its folder"),
        ("link", "files", "link is no plain file"),
        ("scales", "leaves the model alone", "is another one after it was written"),
        ("loses", "rounding", "stored gives other weights"),
        ("script", "proof", "the script of the proof, is not there"),
        ("tolerance", "proof", "the tolerance is 0.0"),
    ):
        found = failed(Faulty(fault))
        assert told in found.get(check, ""), f"{fault}: {found}"
    assert "is no exporter" in failed(object())["builds"]
