"""The ids that a run trains on are those that its tokenizer makes now, whatever it calls itself;
a run goes on only with the ids that it has trained on."""

from __future__ import annotations

import json

import pytest
import torch

from apt_core.kernel import boot
from apt_core.runs import checkpoint, scores
from apt_core.training.prepare import _shared_inputs, prepare

PLUGIN = """
import os
from pathlib import Path

import numpy as np

from apt_core import ProviderSpec, hookimpl
from apt_core.providers.tokenizer import TokenizerProvider


class Shifted(TokenizerProvider):
    name = "shifted"
    version = "1"
    vocab_size = 256

    def encode(self, text):
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        return np.frombuffer(text.encode(), np.uint8) + np.uint8({shift})

    def decode(self, ids):
        return "?" * len(ids)


@hookimpl
def apt_register_providers():
    return [ProviderSpec("tokenizer", "shifted", Shifted, version="{version}")]


@hookimpl
def on_training_start(trainer):
    store = trainer.parts.data.sources[0].store
    print("ids", *(store.part(name).read(0, 1)[0] for name in ("train", "val")))
"""

OPTIONS = ("--data.tokenizer_name", "shifted", "--training.max_steps", "1")


@pytest.fixture
def keeps_ids(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write_plugin(tmp_path):
    def write(shift: object, *, version: str = "1", name: str = "shifting.py") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(PLUGIN.format(shift=shift, version=version), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def with_shift(write_plugin, tmp_path, monkeypatch):
    """The plugin, with a number in the place that ``change`` names."""

    def write(change: str, shift: int) -> str:
        if change == "another plugin":
            return write_plugin(shift, name=f"{shift}/shifting.py")
        if change == "vocabulary":
            (tmp_path / "vocabulary.txt").write_text(str(shift), encoding="utf-8")
            return write_plugin(f"int(Path({str(tmp_path / 'vocabulary.txt')!r}).read_text())")
        if change == "environment":
            monkeypatch.setenv("SHIFT", str(shift))
            return write_plugin("int(os.environ['SHIFT'])")
        # The size and, mostly, the second of the file stay the same.
        return write_plugin(shift, version=str(shift) if change == "version" else "1")

    return write


def ids(run) -> list[int]:
    line = next(line for line in run.out.splitlines() if line.startswith("ids "))
    return [int(word) for word in line.split()[1:]]


@pytest.mark.parametrize(
    "change", ["edited", "version", "another plugin", "vocabulary", "environment"]
)
def test_a_changed_tokenizer_trains_on_its_own_ids_and_ends_a_resume(
    apt_train, with_shift, keeps_ids, change
):
    first = apt_train(*OPTIONS, "--plugin", with_shift(change, 1))
    assert first.code == 0, first.err
    plugin = with_shift(change, 7)
    again = apt_train(*OPTIONS, "--plugin", plugin, name="again")
    assert ids(again) == [number + 6 for number in ids(first)]
    resumed = apt_train(*OPTIONS, "--plugin", plugin, "--resume")
    assert resumed.code != 0
    assert "tokenizer 'shifted' makes other token ids" in resumed.err
    assert "(training text and held-out text)" in resumed.err


def test_a_resume_wants_the_held_out_ids_too_and_an_older_checkpoint_cannot_tell(
    apt_train, write_plugin
):
    apt_train(*OPTIONS, "--plugin", write_plugin(0))
    plugin = write_plugin("(len(text) < 200)")
    resumed = apt_train(*OPTIONS, "--plugin", plugin, "--resume")
    assert resumed.code != 0 and "(held-out text)" in resumed.err
    # As it was written before checkpoints held the hash of the ids.
    found = checkpoint.load(resumed.checkpoints[-1])
    state = {key: value for key, value in found.state.to_json().items() if key != "tokens_sha256"}
    (found.path / "state.json").write_text(json.dumps(state), encoding="utf-8")
    manifest = {**found.manifest, "format": checkpoint.FORMAT}
    manifest["sha256"]["state.json"] = checkpoint._sha256(found.path / "state.json")
    manifest["manifest_sha256"] = scores.digest(manifest)
    (found.path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    resumed = apt_train(*OPTIONS, "--plugin", plugin, "--resume")
    assert resumed.code == 0, resumed.err
    assert "does not say which token ids" in resumed.out


def test_processes_compare_the_ids_that_they_train_on(write_plugin, profile, monkeypatch):
    facts = []
    for shift in "17":
        monkeypatch.setenv("SHIFT", shift)
        plugin = write_plugin("int(os.environ['SHIFT'])")
        kernel = boot(str(profile), plugins=[plugin])
        kernel.config = kernel.config.model_copy(
            update={"data": kernel.config.data.model_copy(update={"tokenizer_name": "shifted"})}
        )
        parts, _ = prepare(kernel, torch.device("cpu"))
        facts.append(_shared_inputs(kernel, None, parts.data, parts.tasks))
    assert facts[0].pop("tokens") != facts[1].pop("tokens")
    assert facts[0] == facts[1]


def test_a_resume_tells_of_a_plugin_whose_code_is_another_one(apt_train, tmp_path):
    plugin = tmp_path / "quiet.py"
    text = "from apt_core import hookimpl\n\n\n@hookimpl\ndef on_step_end(step): {}\n"
    plugin.write_text(text.format("pass"), encoding="utf-8")
    short = ("--training.max_steps", "1", "--plugin", str(plugin))
    first = apt_train(*short)
    (row,) = first.manifest["plugins"]
    assert len(row["source_sha256"]) == 64
    told = "the code of plugin quiet differs from that of the checkpoint"
    assert told not in apt_train(*short, "--resume").out
    plugin.write_text(text.format("step"), encoding="utf-8")
    assert told in apt_train(*short, "--resume").out
    # The checkpoint of the finished run is still the first one's, and another place is no change.
    plugin.write_text(text.format("pass"), encoding="utf-8")
    moved = plugin.rename(tmp_path / "Quiet.py")
    assert told not in apt_train(*short[:-1], str(moved), "--resume").out
