"""Accumulation: the gradient of a step is that of the mean over all of its target tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from apt_core import hookimpl
from apt_core.data.batches import BatchPlan
from apt_core.data.order import Drawn
from apt_core.data.packing.rows import IGNORED
from apt_core.testing import tiny_run

WINDOWS_PER_STEP, SEQ_LEN = 8, 14


@pytest.fixture(autouse=True)
def in_fp64():
    """The model's arithmetic; only the cross-entropy, token by token, is in fp32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class ZLoss:
    """The mean over the targets of the squared log-partition, as a loss term."""

    @hookimpl
    def apt_loss_terms(self, batch: Any, output: Any) -> dict[str, torch.Tensor]:
        return {"z": 0.1 * z_loss(output.logits, batch.targets)}


def z_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.logsumexp(-1)[targets != IGNORED].square().mean()


class Keeper:
    """Keeps loss and gradients of each step, and what they are to be."""

    def __init__(self, *, with_term: bool) -> None:
        self.with_term = with_term
        self.gradients: dict[int, dict[str, torch.Tensor]] = {}
        self.expected: dict[int, dict[str, torch.Tensor]] = {}
        self.losses: dict[int, tuple[float, float]] = {}
        self.sizes: dict[int, list[int]] = {}

    @hookimpl
    def on_step_start(self, step: int, batch: list[Any], trainer: Any) -> None:
        self.sizes[step] = [part.num_targets for part in batch]

    @hookimpl
    def on_backward_end(self, step: int, trainer: Any) -> None:
        parameters = dict(trainer.model.named_parameters())
        self.gradients[step] = {name: p.grad.clone() for name, p in parameters.items()}
        plan = trainer.parts.plan
        epoch, index = divmod(step - 1, plan.steps_per_epoch)
        whole = plan.batch(plan.drawn(epoch + 1, index))
        logits = trainer.model(whole.input_ids).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1), whole.targets.flatten(), ignore_index=IGNORED, reduction="mean"
        )
        if self.with_term:
            loss = loss + 0.1 * z_loss(logits, whole.targets)
        wanted = torch.autograd.grad(loss, list(parameters.values()))
        self.expected[step] = dict(zip(parameters, wanted, strict=True))
        self.mean = loss.item()

    @hookimpl
    def on_step_end(self, step: int, loss: torch.Tensor) -> None:
        self.losses[step] = loss.item(), self.mean


def one_epoch(accumulate: int, *, with_term: bool) -> Keeper:
    keeper = Keeper(with_term=with_term)
    tiny_run(
        keeper,
        *([ZLoss()] if with_term else []),
        overrides={
            "training.max_epochs": 1,
            "training.batch_size": WINDOWS_PER_STEP // accumulate,
            "training.grad_accum_steps": accumulate,
            "training.learning_rate": 1e-30,
            "training.gradient_clip": 0.0,
            "model.max_seq_len": SEQ_LEN,
            "evaluation.sample_tokens": 0,
        },
    )
    return keeper


@pytest.mark.parametrize("with_term", [False, True], ids=["alone", "with a loss term"])
def test_accumulation_changes_no_gradient_and_no_loss(with_term):
    runs = {n: one_epoch(n, with_term=with_term) for n in (1, 4, 8)}
    whole = runs[1]
    last = max(whole.sizes)
    # The cases that a mean of means gets wrong.
    windows_of_last = -(-whole.sizes[last][0] // SEQ_LEN)
    assert windows_of_last < WINDOWS_PER_STEP, "the last step is short"
    assert windows_of_last % 2, "with 4 micro-batches its last one is smaller than the others"
    assert sum(map(sum, whole.sizes.values())) % SEQ_LEN, "the last window is padded"
    assert len(runs[4].sizes[1]) == 4 and len(runs[8].sizes[1]) == 8
    for accumulate, run in runs.items():
        assert run.gradients.keys() == whole.gradients.keys()
        for step, gradients in run.gradients.items():
            for name, gradient in gradients.items():
                where = f"step {step} of {accumulate} micro-batches: {name}"
                torch.testing.assert_close(
                    gradient, whole.gradients[step][name], rtol=1e-9, atol=1e-15, msg=where
                )
                # Against the definition: the cross-entropy of the loop is in fp32.
                torch.testing.assert_close(
                    gradient, run.expected[step][name], rtol=1e-4, atol=1e-7, msg=where
                )
            loss, mean = run.losses[step]
            assert loss == pytest.approx(mean, rel=1e-6)


def test_a_term_of_a_micro_batch_without_targets_counts_nothing(monkeypatch):
    """Of several processes one may have such a batch; a mean over its targets is no number."""

    class Mean:
        @hookimpl
        def apt_loss_terms(self, batch, output):
            counted = batch.targets != IGNORED
            return {"mean": output.logits[counted].square().mean()}

    step = BatchPlan.step

    def padded(self, epoch, index):
        made = step(self, epoch, index)
        nothing = self._micro_batch(Drawn(np.empty(0, np.int64), np.empty(0, np.int64)))
        return made._replace(batches=[*made.batches, nothing])

    plain = tiny_run(Mean(), steps=3)
    monkeypatch.setattr(BatchPlan, "step", padded)
    assert tiny_run(Mean(), steps=3).same_weights(plain)
