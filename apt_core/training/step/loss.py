"""Computes the loss terms that plugins add to the cross-entropy of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from apt_core.data.batches import Batch
from apt_core.metric_names import of_term
from apt_core.training.context import RunContext
from apt_core.types import ModelOutput


def loss_terms(
    run: RunContext, batch: Batch, output: ModelOutput | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(loss/<plugin>.<name>, 0-d tensor)`` for every term. ``output`` may be None if no
    plugin reads it."""
    given = {"batch": batch, "output": output, "trainer": run.trainer}
    for plugin, terms in run.manager.call_each("apt_loss_terms", **given):
        for name, term in terms.items():
            yield of_term(plugin, name), term


def without_gradients(term: Tensor) -> Tensor:
    """Zero in place of ``term`` (0-d), without gradients. The backward still passes through the
    graph of the term, since FSDP2 gathers parameters there in all processes together."""
    zero: Tensor = _WithoutGradients.apply(term)
    return zero


class _WithoutGradients(torch.autograd.Function):
    """Passes None back as the gradient: a gradient of zero could become NaN, as in a mean over
    nothing."""

    @staticmethod
    def forward(ctx: Any, term: Tensor) -> Tensor:
        return torch.zeros_like(term)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None
