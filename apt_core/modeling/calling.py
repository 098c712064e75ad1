"""One way to call a model on a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.data.batches import IGNORED, Batch
from apt_core.modeling.masks import Tokens, padding_marked
from apt_core.modeling.modes import eval_mode

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
