"""The loss of a micro-batch: the cross-entropy and the terms that plugins add."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from apt_core.data.batches import Batch
from apt_core.metric_names import of_term
from apt_core.training.hooks import TrainerHooks
from apt_core.types import ModelOutput


def loss_terms(
    hooks: TrainerHooks, batch: Batch, output: ModelOutput | None
) -> Iterator[tuple[str, Tensor]]:
    """``(loss/<plugin>.<name>, 0-d tensor)`` of every term. ``output`` may be None where none of
    the plugins reads it."""
    for plugin, terms in hooks.call_each("apt_loss_terms", batch=batch, output=output):
        for name, term in terms.items():
            yield of_term(plugin, name), term


def without_gradients(term: Tensor) -> Tensor:
    """Zero, whatever ``term`` (0-d) is. Its backward passes through all that the term was computed
    by, as in the other processes, whose parameters it gathers, and gives no gradient to any."""
    zero: Tensor = _WithoutGradients.apply(term)
    return zero


class _WithoutGradients(torch.autograd.Function):
    """None is passed on, where zero could become NaN: of a mean over nothing for instance."""

    @staticmethod
    def forward(ctx: Any, term: Tensor) -> Tensor:
        return torch.zeros_like(term)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None
