"""Writers with the faults that exports have elsewhere: the certificate catches each, and names the
first block that differs. The shapes are right, and the files load."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apt_core.data.tokenizers.hf import HFTokenizer
from apt_core.modeling.plain import plain_model
from apt_core.providers import (
    ExporterProvider,
    PlainBlock,
    PlainExperts,
    PlainModel,
    TokenizerProvider,
)
from apt_core.requirements import unmet
from apt_core.runs import Session
from apt_plugins.export.comparing import Comparison, compare
from apt_plugins.export.own_answers import OwnAnswers
from apt_plugins.export.questions import questions_for
from apt_plugins.export.runtimes import answered
from tests.plugins.export.conftest import Model, job_of, session_of

pytestmark = pytest.mark.long

MODEL = Model(
    {
        "model.attention_name": "mha",
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.d_ff": 16,  # as wide as the model, so that a transposed expert has the right shape
        "model.tie_embeddings": False,
    },
    {"experts": 3, "top_k": 2},
    tokenizer="bpe",
)
EXPORTERS = {
    "hf": ("apt_plugins.export.hf", "HFExporter"),
    "onnx": ("apt_plugins.export.onnx.exporter", "ONNXExporter"),
    "gguf": ("apt_plugins.export.gguf.exporter", "GGUFExporter"),
}

Spoil = Callable[[PlainModel], PlainModel]


def heads(x: Tensor, model: PlainModel) -> Tensor:
    """The rows of queries, or of keys and values, as heads [H, R, D]."""
    return x.unflatten(0, (-1, model.shape.head_dim))


def interleaved(x: Tensor, model: PlainModel) -> Tensor:
    """The rows of a RoPE that turns neighbours, in place of halves."""
    return heads(x, model).unflatten(1, (2, -1)).transpose(1, 2).reshape(x.shape)


def in_block(number: int, change: Callable[[PlainBlock, PlainModel], PlainBlock]) -> Spoil:
    def spoilt(model: PlainModel) -> PlainModel:
        def block(index: int) -> PlainBlock:
            made = model.block(index)
            return change(made, model) if index == number else made

        return replace(model, block=block)

    return spoilt


def of_attention(**changes: Callable[[Tensor, PlainModel], Tensor]) -> Spoil:
    """The last block with some of its attention's matrices changed."""

    def change(block: PlainBlock, model: PlainModel) -> PlainBlock:
        attention = block.attention
        made = {
            name: f(getattr(attention, name), model).contiguous() for name, f in changes.items()
        }
        return replace(block, attention=replace(attention, **made))

    return in_block(1, change)


def of_experts(**changes: Callable[[PlainExperts], Any]) -> Spoil:
    """The first block with its experts changed."""

    def change(block: PlainBlock, model: PlainModel) -> PlainBlock:
        assert isinstance(block.ffn, PlainExperts)
        made = {name: f(block.ffn).contiguous() for name, f in changes.items()}
        return replace(block, ffn=replace(block.ffn, **made))

    return in_block(0, change)


def with_eps(model: PlainModel) -> PlainModel:
    """The epsilon that most models have, and this one has not."""

    def block(index: int) -> PlainBlock:
        made = model.block(index)
        norms = {
            name: replace(getattr(made, name), eps=1e-5) for name in ("attention_norm", "ffn_norm")
        }
        return replace(made, **norms)

    shape = replace(model.shape, norm_eps=1e-5)
    return replace(model, shape=shape, block=block, final_norm=replace(model.final_norm, eps=1e-5))


def with_other_head(model: PlainModel) -> PlainModel:
    """Tied, where it is not."""
    return replace(model, head=None, shape=replace(model.shape, tied=True))


FIRST, SECOND = "block 0 is the first that differs", "block 1 is the first that differs"
SPOILT: dict[str, tuple[Spoil, str]] = {
    "query heads permuted": (
        of_attention(q=lambda q, model: heads(q, model).roll(1, 0).flatten(0, 1)),
        SECOND,
    ),
    "queries and keys for a RoPE of neighbours": (
        of_attention(q=interleaved, k=interleaved),
        SECOND,
    ),
    "keys and values exchanged": (
        in_block(
            1,
            lambda block, model: replace(
                block,
                attention=replace(block.attention, k=block.attention.v, v=block.attention.k),
            ),
        ),
        SECOND,
    ),
    "an expert transposed": (
        of_experts(down=lambda ffn: torch.stack([ffn.down[0], ffn.down[1].T, ffn.down[2]])),
        FIRST,
    ),
    "experts in another order": (of_experts(gate=lambda ffn: ffn.gate.flip(0)), FIRST),
    "gate and up exchanged": (of_experts(gate=lambda f: f.up, up=lambda f: f.gate), FIRST),
    "the epsilon of another model": (with_eps, FIRST),
    "the embedding as the head": (
        with_other_head,
        "every block agrees, so that the final norm or the projection differs",
    ),
}


def without_merge(data: dict[str, Any]) -> None:
    """The last merge, which few texts need."""
    del data["model"]["merges"][-1]


def changed(
    tokenizer: TokenizerProvider,
    folder: Path,
    change: Callable[[dict[str, Any]], None] = lambda data: None,
    template: bool = True,
) -> TokenizerProvider:
    """A tokenizer whose tokenizer.json was changed, or which has no chat template any more."""
    folder.mkdir()
    tokenizer.save(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data), "utf-8")
    if not template:
        path = folder / "tokenizer_config.json"
        kept = json.loads(path.read_text("utf-8"))
        kept.pop("chat_template", None)
        path.write_text(json.dumps(kept), "utf-8")
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    return HFTokenizer({"path": str(folder)})


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    session = session_of(MODEL, tmp_path_factory.mktemp("model"))
    with torch.no_grad():
        session.model.embedding.weight.mul_(0.02)  # where streams begin small, an epsilon tells
    return session


@pytest.fixture(scope="module", params=EXPORTERS)
def comparisons(
    request: pytest.FixtureRequest, session: Session, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Comparison]:
    """What the certificate finds of each broken writer of an exporter, in one process."""
    module, name = EXPORTERS[request.param]
    if request.param != "hf":
        pytest.importorskip(request.param, reason="what writes the exports is not installed")
    exporter: ExporterProvider = getattr(importlib.import_module(module), name)()
    proof = exporter.proof
    assert proof is not None
    if missing := unmet(proof.requires):
        pytest.skip(f"{proof.runtime} is needed: {'; '.join(missing)}")
    plain, tokenizer = plain_model(session.model, session.tokenizer.vocab_size), session.tokenizer
    writers = {name: (spoil(plain), tokenizer) for name, (spoil, _) in SPOILT.items()}
    folder = tmp_path_factory.mktemp("tokenizers")
    lost = changed(tokenizer, folder / "merge", without_merge)
    mute = changed(tokenizer, folder / "template", template=False)
    writers |= {
        "a merge lost": (plain, lost),
        "no template": (plain, mute),
        "none": (plain, tokenizer),
    }
    questions = questions_for(plain.shape, tokenizer, num_prompts=6, new_tokens=4)
    targets = []
    for name, (model, written) in writers.items():
        target = folder / name
        target.mkdir()
        exporter.write(job_of(target, model, written))
        targets.append((target, questions))
    own = OwnAnswers(session)
    with answered(proof, targets) as answers:
        return {
            name: compare(own, foreign, questions, proof.tolerance)
            for name, foreign in zip(writers, answers, strict=True)
        }


def test_each_broken_writer_is_caught_and_its_first_block_named(
    comparisons: dict[str, Comparison],
) -> None:
    assert comparisons["none"].faults == []
    for name, (_, told) in SPOILT.items():
        faults = comparisons[name].faults
        assert faults and told in faults[0], f"{name}: {faults}"
        assert comparisons[name].logits.relative > 10 * comparisons[name].tolerance, name
    assert any("its tokenizer encodes 1 of" in each for each in comparisons["a merge lost"].faults)
    assert "a conversation of 1 messages" in comparisons["no template"].faults[0]
