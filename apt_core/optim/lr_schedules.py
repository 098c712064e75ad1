"""The core's learning-rate schedules, all with a linear warm-up."""

from __future__ import annotations

import math
from abc import abstractmethod

from apt_core.providers.lr_schedule import DECAY_RATIO, LRScheduleProvider


class WarmedUp(LRScheduleProvider):
    """A linear warm-up, then a decay to ``min_ratio`` whose shape a subclass defines."""

    def factor(
        self, step: int, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0
    ) -> float:
        if step <= warmup_steps:
            return step / warmup_steps
        end = max(total_steps, warmup_steps + 1)
        return min_ratio + (1 - min_ratio) * self.height(min(step, end), warmup_steps, end)

    @abstractmethod
    def height(self, step: int, start: int, end: int) -> float:
        """The shape of the decay at ``step``: 1 at ``start``, the last step of the warm-up, and 0
        at ``end``."""


class CosineProvider(WarmedUp):
    """``lr_schedule:cosine``: half a cosine (Loshchilov and Hutter, arXiv:1608.03983)."""

    name = "cosine"

    def height(self, step: int, start: int, end: int) -> float:
        return (1 + math.cos(math.pi * ((step - start) / (end - start)))) / 2


class LinearProvider(WarmedUp):
    """``lr_schedule:linear``: a straight line."""

    name = "linear"

    def height(self, step: int, start: int, end: int) -> float:
        return (end - step) / (end - start)


class WSDProvider(WarmedUp):
    """``lr_schedule:wsd``: warm-up, stable, decay. Setting ``decay_ratio`` is the share of the
    steps, at the end, over which it decays; with 0 it stays.

    The decay is 1 - sqrt(progress), which Hägele et al. (arXiv:2405.18392) found better than a
    straight line, and with a fifth of the steps as good as a cosine.
    """

    name = "wsd"

    def height(self, step: int, start: int, end: int) -> float:
        ratio = self.setting("decay_ratio", DECAY_RATIO)
        begin = max(start, end * (1 - ratio))
        if step <= begin:
            return 1.0
        return 1 - math.sqrt((step - begin) / (end - begin))


class ConstantProvider(LRScheduleProvider):
    """``lr_schedule:constant``: a linear rise over the warm-up, then 1, whatever ``min_ratio``
    is: it does not depend on the length of the run."""

    name = "constant"

    def factor(
        self, step: int, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0
    ) -> float:
        return step / warmup_steps if step < warmup_steps else 1.0
