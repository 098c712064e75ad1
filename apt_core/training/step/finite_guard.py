"""Checks once a step that its loss and gradients are finite."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor
from torch.optim import Optimizer

from apt_core.optim.build import decides_on_device


class FiniteGuard:
    """Skips steps whose loss or gradients are not finite, and records their numbers.

    If the optimizer takes ``found_inf`` (torch's fused ones, Muon) and runs on an accelerator, the
    decision stays on the device. The outcomes of up to ``window`` steps are kept there until they
    are read; a full window waits for the device once, so ``window`` should be the number of steps
    between two calls of :meth:`read`. Otherwise the host decides, once a step.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device, *, window: int) -> None:
        self._optimizer = optimizer
        self._slots: tuple[Tensor, ...] = ()
        if decides_on_device(optimizer, device):
            self._outcomes = torch.zeros(window, device=device)
            self._slots = self._outcomes.unbind()
        self._pending: list[int] = []
        self._total = self._in_a_row = 0
        self._skipped: list[int] = []

    def step(self, step: int, loss: Tensor, grad_norm: Tensor) -> bool | Tensor:
        """Take the optimizer's step for step ``step`` of the run, unless ``loss`` or ``grad_norm``
        (0-d) is not finite.

        Returns whether it was skipped; if the device decides, as a 0-d tensor of 1.0 or 0.0.
        """
        if self._slots:
            if len(self._pending) == len(self._slots):
                self._collect()
            skip = self._slots[len(self._pending)]
            # Zero times NaN or infinity is NaN, which differs from zero.
            torch.ne((loss + grad_norm) * 0.0, 0.0, out=skip)
            self._pending.append(step)
            self._optimizer.grad_scale = None
            self._optimizer.found_inf = skip
            self._optimizer.step()
            return skip
        if isfinite(loss.item()) and isfinite(grad_norm.item()):
            self._in_a_row = 0
            self._optimizer.step()
            return False
        self._count(step)
        return True

    def read(self) -> tuple[int, int, list[int]]:
        """The number of skipped steps, the number of those in a row up to now, and the step numbers
        of those since the last call; waits for the device."""
        self._collect()
        steps, self._skipped = self._skipped, []
        return self._total, self._in_a_row, steps

    @property
    def known(self) -> int:
        """The number of skipped steps that the host knows of, without waiting for the device."""
        return self._total

    @property
    def in_a_row(self) -> int:
        """The number of skipped steps in a row up to now; waits for the device."""
        self._collect()
        return self._in_a_row

    def state(self) -> list[int]:
        """The state for :meth:`load`; waits for the device. It holds the step numbers that
        :meth:`read` has not returned yet, which stay unread."""
        self._collect()
        return [self._total, self._in_a_row, *self._skipped]

    def load(self, total: int, in_a_row: int, *unread: int) -> None:
        """Restore a :meth:`state`."""
        self._pending.clear()
        self._total, self._in_a_row, self._skipped = total, in_a_row, list(unread)

    def forget(self, steps: int) -> None:
        """Drop the last ``steps`` steps, all of which were skipped; waits for the device."""
        self._collect()
        self._total -= steps
        self._in_a_row -= steps
        del self._skipped[max(0, len(self._skipped) - steps) :]

    def _count(self, step: int) -> None:
        self._total += 1
        self._in_a_row += 1
        self._skipped.append(step)

    def _collect(self) -> None:
        """Bring the outcomes of the pending steps to the host."""
        if not self._pending:
            return
        for step, skipped in zip(self._pending, self._outcomes.tolist(), strict=False):
            if skipped:
                self._count(step)
            else:
                self._in_a_row = 0
        self._pending.clear()
