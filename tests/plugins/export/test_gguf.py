"""``exporter:gguf``: what llama.cpp makes of its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.optional import optional

gguf = optional("gguf", "what writes GGUF is not installed")
optional("xllamacpp", "what runs the exports is not installed")

from apt_core.modeling.plain import plain_model
from apt_core.providers import PlainShape
from apt_core.runs import Session
from apt_plugins.export.comparing import Comparison
from apt_plugins.export.gguf import exporter as exporter_module
from apt_plugins.export.gguf.exporter import FILE, GGUFExporter
from apt_plugins.export.gguf.header import write_vocabulary
from tests.plugins.export.conftest import MODELS, Certify, Model, certified, job_of, session_of

REFUSED = "tva factored, embedding norm, hf"
HELD = [name for name in MODELS if name != REFUSED]
ARCHITECTURES = {
    "tva": "llama",
    "experts, yarn": "llama",
    "tva rank 6, gqa, QK-norm, vft": "qwen3",
    "experts, QK-norm, untied": "qwen3moe",
}


@pytest.fixture(scope="module")
def comparisons(certify: Certify) -> dict[str, Comparison]:
    return certify(GGUFExporter(), HELD)


@pytest.mark.parametrize("name", HELD)
def test_llama_cpp_computes_and_encodes_the_same(
    comparisons: dict[str, Comparison], name: str
) -> None:
    found = comparisons[name]
    assert found.faults == []
    assert found.logits.relative < 1e-4 and found.places > 200
    assert len(found.blocks) == 2 and all(each.relative < 1e-4 for each in found.blocks.values())
    assert found.tokens == found.equal_tokens and found.prompts == 20 and not found.ties
    assert found.encoded >= 32


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Session]:
    """A model whose rows are made of whole blocks of 32 numbers."""
    settings = {"model.d_model": 32, "model.num_heads": 2, "model.tva.s": 0}
    settings |= {"model.tva.qk_norm": True, "model.tie_embeddings": False}
    model = Model(settings, {"experts": 4, "top_k": 2})
    return {"wide": session_of(model, tmp_path_factory.mktemp("wide"))}


@pytest.mark.parametrize("number_format", ["bf16", "Q8_0", "Q4_0"])
@pytest.mark.long
def test_a_rounded_file_holds_the_rounded_model(
    wide: dict[str, Session], tmp_path_factory: pytest.TempPathFactory, number_format: str
) -> None:
    found = certified(wide, tmp_path_factory, GGUFExporter({"type": number_format}))["wide"]
    assert found.faults == []
    assert 0 < found.logits.relative < 0.1 and found.share == 0.9
    assert found.equal_tokens > 0.9 * found.tokens


@pytest.mark.long
def test_another_end_and_another_layout_of_a_rounded_file_are_caught(
    wide: dict[str, Session],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def faults(**options: Any) -> str:
        found = certified(wide, tmp_path_factory, GGUFExporter(options), num_prompts=4)
        return "; ".join(found["wide"].faults)

    def other_end(writer: Any, vocabulary: Any, special: Any, template: Any) -> None:
        write_vocabulary(writer, vocabulary, replace(special, eos=250), template)

    with monkeypatch.context() as patch:
        patch.setattr(exporter_module, "write_vocabulary", other_end)
        assert "it ends texts at the ids [249, 250]" in faults()
    monkeypatch.setattr(exporter_module, "turns_neighbours", lambda arch: True)
    assert "block 0 is the first that differs" in faults(type="Q4_0")


def written(session: Session, folder: Path, **options: Any) -> Any:
    folder.mkdir()
    plain = plain_model(session.model, session.tokenizer.vocab_size)
    GGUFExporter(options).write(job_of(folder, plain, session.tokenizer))
    return gguf.GGUFReader(folder / FILE)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_architecture_follows_the_shape(
    models: dict[str, Session], name: str, tmp_path: Path
) -> None:
    reader = written(models[name], tmp_path / "export")
    arch = ARCHITECTURES[name]
    assert reader.fields["general.architecture"].contents() == arch
    width = reader.fields[f"{arch}.attention.key_length"].contents()
    assert width == plain_model(models[name].model).shape.head_dim
    assert width == reader.fields[f"{arch}.rope.dimension_count"].contents()


def test_what_bears_rounding_least_is_rounded_less(
    wide: dict[str, Session], tmp_path: Path
) -> None:
    reader = written(wide["wide"], tmp_path / "export", type="Q4_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["output.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.ffn_gate_inp.weight"] == types["blk.1.attn_q_norm.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == "Q4_0"


def test_a_modelfile_says_what_ollama_cannot_read_from_the_file(
    models: dict[str, Session], tmp_path: Path
) -> None:
    written(models["tva"], tmp_path / "export")
    lines = (tmp_path / "export" / "Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM ./{FILE}", "PARAMETER num_ctx 260"]
    assert 'PARAMETER stop "<|end|>"' in lines
    assert lines[-1].startswith('TEMPLATE "{{ range .Messages }}<|{{ .Role }}|>')


def test_what_llama_cpp_has_not_is_refused(models: dict[str, Session]) -> None:
    def problems(name: str, **changes: Any) -> str:
        session = models[name]
        shape: PlainShape = replace(plain_model(session.model).shape, **changes)
        return "\n".join(map(str, GGUFExporter().check(shape, session.tokenizer)))

    assert "puts a space before texts that begin with none" in problems(REFUSED)
    assert "are not divided by their sum" in problems("experts, yarn", renormalised=False)
    assert "Llama 3" in problems("gqa, llama3 RoPE, bpe", qk_norm=True)
    assert "has the id 255, and the model 200 ids" in problems("tva", vocab_size=200)
