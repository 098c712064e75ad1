"""The loss of a micro-batch: the cross-entropy and the terms that plugins add."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.data.batches import IGNORED, Batch
from apt_core.metric_names import of_term
from apt_core.modeling.masks import Tokens, padding_marked
from apt_core.modeling.modes import eval_mode
from apt_core.types import ModelOutput

if TYPE_CHECKING:
    from apt_core.training.trainer import Trainer


Result = TypeVar("Result")


def forward_batch(forward: Callable[[Tensor], Result], model: nn.Module, batch: Batch) -> Result:
    """What ``forward``, the ``model`` itself or what calls it, gives for ``batch`` in training; its
    layers know which positions are padding."""
    if batch.num_targets == batch.targets.numel():
        return forward(batch.input_ids)
    tokens = Tokens(batch.targets != IGNORED, batch.num_targets)
    with padding_marked(model, tokens):
        return forward(batch.input_ids)


@torch.no_grad()
def losses_in_fp32(model: nn.Module, batch: Batch) -> Tensor:
    """The cross-entropy of each token of ``batch`` [B*T], in nats, computed in fp32 in eval mode; 0
    where there is no target."""
    with eval_mode(model):
        logits = model(batch.input_ids).logits
    # A sequence at a time, for it takes as much again as its logits.
    return torch.cat(
        [
            F.cross_entropy(row.float(), targets, ignore_index=IGNORED, reduction="none")
            for row, targets in zip(logits, batch.targets, strict=True)
        ]
    )


def loss_terms(
    trainer: Trainer, batch: Batch, output: ModelOutput | None
) -> Iterator[tuple[str, Tensor]]:
    """``(loss/<plugin>.<name>, 0-d tensor)`` of every term. ``output`` may be None where none of
    the plugins reads it."""
    for plugin, terms in trainer.manager.call_each(
        "apt_loss_terms", trainer=trainer, batch=batch, output=output
    ):
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
