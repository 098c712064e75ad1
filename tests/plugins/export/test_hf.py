"""``exporter:hf``: what transformers makes of its folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.optional import optional

optional("transformers", "what runs the exports is not installed")

from apt_core import AptError, ConfigError
from apt_core.data.tokenizers.bpe import BPETokenizer
from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.modeling.plain import drop_beyond, plain_model
from apt_core.providers import SpecialTokens, TokenizerProvider
from apt_core.runs import Session
from apt_core.testing import tiny_session
from apt_plugins.export.certificate import Origin
from apt_plugins.export.comparing import Comparison
from apt_plugins.export.computing import PlainRunner
from apt_plugins.export.exporting import Order, export, plain_form
from apt_plugins.export.hf import HFExporter
from apt_plugins.export.plain_weights import PlainWeightsExporter
from tests.plugins.export.conftest import MODELS, WINDOWED, Certify, job_of

KINDS = {"tva": "llama", "experts, yarn": "mixtral", "experts, QK-norm, untied": "qwen3_moe"}
KINDS["tva rank 6, gqa, QK-norm, vft"] = "qwen3"
KINDS["in a window"] = "mistral"


@pytest.fixture(scope="module")
def comparisons(certify: Certify) -> dict[str, Comparison]:
    return certify(HFExporter({"max_shard_size": 40_000}))


@pytest.mark.parametrize("name", [*MODELS, *WINDOWED])
def test_transformers_computes_and_encodes_the_same(
    comparisons: dict[str, Comparison], name: str
) -> None:
    found = comparisons[name]
    assert found.faults == []
    assert found.logits.absolute <= 1e-5 and found.places > 200
    assert len(found.blocks) == 2 and all(each.relative < 1e-5 for each in found.blocks.values())
    assert found.tokens == found.equal_tokens and found.prompts == 20 and not found.ties
    assert found.encoded > 80 and found.ends_equal
    if name == "tva":
        assert found.tokens > 3700


def test_the_type_of_model_follows_the_shape(models: dict[str, Session], tmp_path: Path) -> None:
    for name, kind in KINDS.items():
        folder = tmp_path / kind
        folder.mkdir()
        session = models[name]
        plain = plain_model(session.model, session.tokenizer.vocab_size, {"window"})
        HFExporter().write(job_of(folder, plain, session.tokenizer))
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == kind and config["vocab_size"] == plain.shape.vocab_size
        assert [*folder.glob("*.safetensors")] == [folder / "model.safetensors"]


def test_what_a_window_leaves_out_is_refused_with_the_option_that_drops_it(
    models: dict[str, Session], tmp_path: Path
) -> None:
    """Where the exporter does not know windows, layers have several, or a prefix stays in sight."""
    windowed = models["in a window"]
    ids = windowed.tokenizer.encode("longer than its window of seven")
    runner = PlainRunner(plain_model(windowed.model, holds={"window"}))
    with torch.no_grad():
        logits = windowed.model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(runner.forward(ids)[0], logits, rtol=1e-4, atol=1e-5)
    flex = {"model.attention_pattern": ["flex"], "model.num_layers": 2, "model.max_seq_len": 40}
    mixed = {**flex, "model.attention_pattern": ["flex", "mha"], "model.flex.window": 7}
    for settings, exporter, told in (
        ({**flex, "model.flex.window": 7}, PlainWeightsExporter(), "a window of 7 tokens"),
        (mixed, HFExporter(), "its window is None, that of blocks.0 is 7"),
        ({**flex, "model.flex.window": 7, "model.flex.prefix": 2}, HFExporter(), "first 2 tokens"),
    ):
        session = tiny_session(overrides=settings)
        with pytest.raises(ConfigError) as caught:
            plain_form(session, exporter)
        [problem] = caught.value.problems
        assert told in str(problem)
        name = "prefix" if "prefix" in str(problem) else "window"
        assert f"--drop {name} leaves it out" in str(problem)
        drop_beyond(session.model, [name])
        whole = plain_form(session, exporter).shape
        assert whole.window == (7 if name == "prefix" else None)


class Shouting(ByteTokenizer):
    """Saves no file that another program could read."""

    def encode(self, text: str) -> list[int]:
        return super().encode(text.upper())


class Short(BPETokenizer):
    """Saves the file of another tokenizer than it is."""

    @property
    def vocab_size(self) -> int:
        return super().vocab_size - 1

    special = SpecialTokens()


class Failing(ByteTokenizer):
    def save(self, folder: Path) -> None:
        raise RuntimeError("no idea\nhow")


@pytest.mark.parametrize(
    ("tokenizer", "told"),
    [
        (Shouting(), "the tokenizer byte saves no tokenizer.json"),
        (Short(), "has 262 ids, and its tokenizer.json 263"),
        (Failing(), "saving the tokenizer byte failed: RuntimeError: no idea"),
    ],
)
def test_a_tokenizer_that_no_program_reads_is_refused(
    models: dict[str, Session], tokenizer: TokenizerProvider, told: str
) -> None:
    plain = plain_model(models["tva"].model)
    for exporter in (HFExporter(), PlainWeightsExporter()):
        [problem] = exporter.check(plain.shape, tokenizer)
        assert told in str(problem)


def test_experts_without_renormalised_weights_need_qk_norm(models: dict[str, Session]) -> None:
    shape = plain_model(models["experts, yarn"].model).shape
    tokenizer = models["tva"].tokenizer
    assert not [*HFExporter().check(shape, tokenizer)]
    [problem] = HFExporter().check(replace(shape, renormalised=False), tokenizer)
    assert "not renormalised, which Mixtral's are" in str(problem)
    assert not [*HFExporter().check(replace(shape, renormalised=False, qk_norm=True), tokenizer)]


@pytest.mark.parametrize("target", ["hf", "safetensors"])
def test_a_full_disk_leaves_nothing(small_disk: Path, target: str) -> None:
    session = tiny_session("export", overrides={"model.d_ff": 8192})
    order = Order(target, small_disk / "new" / "out", Origin(run=".."), unproven=True)
    with pytest.raises(AptError, match=r"the export cannot be written: .*No space left") as caught:
        export(session, order)
    assert caught.value.exit_code == 1 and not [*small_disk.iterdir()]
