"""The gradients of a step, once they are complete."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor, nn

from apt_core.log import get_logger
from apt_core.training.distributed import is_sharded, whole_tensor

log = get_logger("apt.training")


class Clipping:
    """Scales the gradients of ``parameters`` down to a norm of at most ``max_norm``; 0 leaves them.
    Those of frozen parameters go.

    On a CPU the norm is read, which waits for nothing: most steps then scale nothing. (By torch's
    functions, which scale by a factor of 1, it takes 83 in place of 24 us for 12 small tensors.)
    """

    def __init__(self, parameters: Sequence[Tensor], max_norm: float) -> None:
        self._parameters, self._max_norm = parameters, max_norm
        kinds = {(p.device.type, p.dtype, is_sharded(p)) for p in parameters}
        self._reads = kinds == {("cpu", torch.float32, False)}

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Clip; the norm that the gradients had, 0-d, the same in every process."""
        for parameter in self._parameters:
            if not parameter.requires_grad:  # frozen since its backward
                parameter.grad = None
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if not self._reads or not gradients:
            norm = nn.utils.get_total_norm(gradients)
            if self._max_norm:
                nn.utils.clip_grads_with_norm_(self._parameters, self._max_norm, norm)
            return whole_tensor(norm)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        value = norm.item()
        if self._max_norm and self._max_norm < value < inf:
            torch._foreach_mul_(gradients, self._max_norm / value)
        return norm


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
