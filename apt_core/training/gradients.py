"""The gradients of a step, once they are complete."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apt_core.training.distributed import whole_tensor

log = logging.getLogger("apt.training")


def clip(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients down to a norm of at most ``max_norm`` (0: leave them); returns the norm
    that they had, 0-d, the same in every process."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return whole_tensor(norm)


def name_bad_gradients(model: nn.Module, norm: Tensor, step: int) -> None:
    """Log whose gradients are not finite, if ``norm`` is not; waits for the device."""
    if torch.isfinite(norm):
        return
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    log.warning("step %d: gradients that are not finite in %s", step, ", ".join(bad[:8]))
