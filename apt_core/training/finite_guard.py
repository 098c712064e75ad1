"""One check a step that its loss and gradients are finite."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer


class FiniteGuard:
    """Makes a step whose gradients are not finite change nothing, and counts such steps.

    Where the optimizer takes ``found_inf`` (torch's fused ones) the decision stays on the device;
    elsewhere it is read on the host, once a step.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        # On a CPU there is nothing to wait for, and reading costs less than passing it on.
        fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._on_device = fused and device.type != "cpu"
        self._in_a_row = torch.zeros((), device=device)
        self._total = torch.zeros((), device=device)

    def step(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Take the optimizer's step unless ``loss`` or ``grad_norm`` is not finite."""
        skipped = 1.0 - torch.isfinite(loss + grad_norm).float()
        self._total += skipped
        self._in_a_row = (self._in_a_row + 1.0) * skipped
        if self._on_device:
            self._optimizer.grad_scale = None
            self._optimizer.found_inf = skipped
            self._optimizer.step()
        elif not skipped.item():
            self._optimizer.step()

    def read(self) -> tuple[int, int]:
        """Skipped steps in all and in a row; waits for the device."""
        return int(self._total.item()), int(self._in_a_row.item())

    def load(self, total: int, in_a_row: int) -> None:
        self._total.fill_(total)
        self._in_a_row.fill_(in_a_row)
