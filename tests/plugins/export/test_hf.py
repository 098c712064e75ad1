"""``exporter:hf``: what transformers makes of its folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="what runs the exports is not installed")

from apt_core.modeling.plain import plain_model
from apt_core.providers import ExportJob
from apt_core.runs import Session
from apt_plugins.export.comparing import Comparison
from apt_plugins.export.hf import HFExporter
from tests.plugins.export.conftest import MODELS, Certify

KINDS = {"tva": "llama", "experts, yarn": "mixtral", "experts, QK-norm, untied": "qwen3_moe"}
KINDS["tva rank 6, gqa, QK-norm, vft"] = "qwen3"


@pytest.fixture(scope="module")
def comparisons(certify: Certify) -> dict[str, Comparison]:
    return certify(HFExporter({"max_shard_size": 40_000}))


@pytest.mark.parametrize("name", MODELS)
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
        plain = plain_model(session.model, session.tokenizer.vocab_size)
        HFExporter().write(ExportJob(folder, plain, session.tokenizer, "tiny"))
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == kind and config["vocab_size"] == plain.shape.vocab_size
        assert [*folder.glob("*.safetensors")] == [folder / "model.safetensors"]
