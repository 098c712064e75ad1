"""One check a step that its loss and gradients are finite."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor
from torch.optim import Optimizer

from apt_core.optim.build import decides_on_device


class FiniteGuard:
    """Makes a step whose loss or gradients are not finite change nothing, and says which it was.

    Where the optimizer takes ``found_inf`` (torch's fused ones, Muon) on a device beside the CPU,
    the decision stays on that device: the outcomes of up to ``window`` steps are kept there until
    they are asked for, and a full window waits for them once. Give it as many steps as lie between
    two calls of :meth:`read`. Elsewhere the decision is read on the host, once a step.
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
        """Take the optimizer's step, which is step ``step`` of the run, unless ``loss`` or
        ``grad_norm`` (0-d) is not finite.

        Returns whether it was void; where the device decides, a 0-d tensor of 1.0 or 0.0.
        """
        if self._slots:
            if len(self._pending) == len(self._slots):
                self._collect()
            skip = self._slots[len(self._pending)]
            # Zero times what is not finite is NaN, which differs from zero.
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
        """Skipped steps in all, those in a row up to now, and the numbers of those since the last
        call; waits for the device."""
        self._collect()
        steps, self._skipped = self._skipped, []
        return self._total, self._in_a_row, steps

    @property
    def known(self) -> int:
        """Skipped steps in all, as far as the host knows of them."""
        return self._total

    @property
    def in_a_row(self) -> int:
        """Skipped steps up to now without another between; waits for the device."""
        self._collect()
        return self._in_a_row

    def state(self) -> list[int]:
        """What a checkpoint keeps, for :meth:`load`; waits for the device. The numbers that were
        not read yet are part of it, and stay unread."""
        self._collect()
        return [self._total, self._in_a_row, *self._skipped]

    def load(self, total: int, in_a_row: int, *unread: int) -> None:
        """Go on from the :meth:`state` of before."""
        self._pending.clear()
        self._total, self._in_a_row, self._skipped = total, in_a_row, list(unread)

    def forget(self, steps: int) -> None:
        """Forget the last ``steps``, all of which were skipped; waits for the device."""
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
