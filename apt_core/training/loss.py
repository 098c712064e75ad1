"""The loss of a micro-batch: the cross-entropy and the terms that plugins add."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from apt_core.data.batches import IGNORED, Batch
from apt_core.metric_names import of_term
from apt_core.types import ModelOutput

if TYPE_CHECKING:
    from apt_core.training.trainer import Trainer


def cross_entropy_sum(output: ModelOutput, batch: Batch) -> Tensor:
    """The cross-entropy summed over the target tokens, in nats, in fp32."""
    logits = output.logits.flatten(0, 1).float()
    return F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")


def loss_terms(trainer: Trainer, batch: Batch, output: ModelOutput) -> Iterator[tuple[str, Tensor]]:
    """``(loss/<plugin>.<name>, 0-d tensor)`` of every term; what is no such tensor is a failure of
    the plugin that returned it."""
    for plugin, terms in trainer.manager.call_each(
        "apt_loss_terms", trainer=trainer, batch=batch, output=output
    ):
        try:
            checked = [(of_term(plugin, name), _scalar(term)) for name, term in terms.items()]
        except (TypeError, ValueError, AttributeError) as error:
            trainer.manager.fail(plugin, "apt_loss_terms", error)
            continue
        yield from checked


def _scalar(term: Any) -> Tensor:
    if not isinstance(term, Tensor):
        raise TypeError(f"a loss term is a {type(term).__name__}, not a tensor")
    if not term.is_floating_point():
        raise TypeError(f"a loss term is of type {term.dtype}, not a real floating type")
    if term.ndim != 0:
        raise ValueError(f"a loss term has the shape {list(term.shape)}: reduce it to 0-d")
    return term
