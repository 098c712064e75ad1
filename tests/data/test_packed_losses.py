"""Documents that share a row are trained as each is alone, and what is not learned gives no loss,
wherever a model is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from apt_core.data.batches import Batch
from apt_core.data.packing.pieces import PieceIndex, PieceWindows, pack_documents, pad_documents
from apt_core.data.packing.rows import IGNORED
from apt_core.data.store.parts import ArrayPart
from apt_core.modeling.calling import forward_batch, losses_in_fp32
from apt_core.modeling.cross_entropy import cross_entropy_sum
from apt_core.providers import Encoded
from apt_core.testing import TINY_PROFILE, tiny_run, tiny_session

LENGTH = 16


def part(*, prompts: bool) -> ArrayPart:
    random = np.random.default_rng(4)
    found = []
    for length in (5, 9, 3, 17, 2, 12, 7, 40):
        ids = random.integers(0, 250, length).astype(np.uint8)
        learned = np.arange(length) >= max(1, length // 2) if prompts else None
        found.append(Encoded(ids, learned))
    return ArrayPart.of(found)


def model_of(attention: str) -> nn.Module:
    torch.manual_seed(3)
    overrides = {"model.attention_name": attention, "model.max_seq_len": 64, "model.num_layers": 2}
    if attention == "flex":
        overrides |= {"model.flex.window": 6, "model.flex.prefix": 2}
    return tiny_session(overrides=overrides).model.double().eval()


def loss_and_gradients(model: nn.Module, batches: list[Batch]) -> tuple[float, dict[str, Any]]:
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = cross_entropy_sum(forward_batch(model, model, batch), batch.targets)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def alone(rows: PieceWindows) -> list[Batch]:
    """Each piece as a batch of its own, without any padding."""
    found = []
    for row in range(len(rows)):
        for start, length in zip(*rows.index.pieces(row), strict=True):
            ids = rows.part.read(int(start), int(start + length + 1)).astype(np.int64)
            marks = rows.part.marks(int(start) + 1, int(start + length + 1))
            targets = np.where(marks, ids[1:], IGNORED)
            found.append(
                Batch(
                    torch.from_numpy(ids[None, :-1]),
                    torch.from_numpy(targets[None]),
                    int(marks.sum()),
                    num_tokens=len(targets),
                )
            )
    return found


@pytest.mark.parametrize("attention", ["tva_default", "mha", "flex"])
@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("packing", ["documents", "pad"])
def test_rows_of_documents_give_the_losses_and_gradients_of_each_alone(
    attention: str, prompts: bool, packing: str
) -> None:
    tokens, model = part(prompts=prompts), model_of(attention)
    blocks = (
        pack_documents(tokens, LENGTH)
        if packing == "documents"
        else pad_documents(tokens, LENGTH, truncation=False)
    )
    packed = packing == "documents"
    windows = PieceWindows(tokens, LENGTH, PieceIndex.of(blocks), packed=packed, pad=7)
    whole = Batch.of_rows(windows.rows(np.arange(len(windows))))
    loss, gradients = loss_and_gradients(model, [whole])
    expected, each = loss_and_gradients(model, alone(windows))
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, each[name], rtol=1e-5, atol=1e-5)
    assert float(losses_in_fp32(model, whole).sum()) == pytest.approx(expected, rel=1e-5)


def test_a_prompt_gives_no_loss() -> None:
    """Other ids in place of a prompt's targets change nothing: they are never predicted."""
    model = model_of("tva_default")
    windows = PieceWindows(
        part(prompts=True),
        LENGTH,
        PieceIndex.of(pack_documents(part(prompts=True), LENGTH)),
        packed=True,
    )
    batch = Batch.of_rows(windows.rows(np.arange(len(windows))))
    losses = losses_in_fp32(model, batch).view_as(batch.targets)
    assert (losses[batch.targets == IGNORED] == 0).all()
    assert (losses[batch.targets != IGNORED] > 0).all()
    assert batch.num_targets < batch.num_tokens


def test_a_step_and_an_evaluation_without_a_target_change_nothing_and_claim_nothing(
    tmp_path: Path,
) -> None:
    """Prompts that are longer than windows, one after the other: some windows have no target."""
    rows = [{"prompt": "why? " * 12, "response": "so"}] * 40
    text = tmp_path / "pairs.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"train_path": str(text), "val_path": str(text), "packing": "concat"}
    run = tiny_run(
        profile={**TINY_PROFILE, "data": data},
        overrides={
            "training.batch_size": 1,
            "training.log_every_steps": 1,
            "evaluation.eval_batches": 1,
            "evaluation.sample_tokens": 0,
        },
        steps=12,
    )
    losses = [row["loss"] for row in run.metrics if "loss" in row]
    assert run.result.step == 12 and 0.0 in losses and max(losses) > 1
    assert run.result.figures["val_loss"] > 1
