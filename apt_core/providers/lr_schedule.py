"""Providers of learning-rate schedules (kind ``lr_schedule``)."""

from __future__ import annotations

from abc import ABC, abstractmethod

from apt_core.providers.base import Provider

DECAY_RATIO = 0.2
"""Default of ``training.decay_ratio``."""


class LRScheduleProvider(Provider, ABC):
    """A learning-rate schedule: a pure function of the position, with no state to save."""

    @abstractmethod
    def factor(
        self, step: int, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0
    ) -> float:
        """The factor on the peak learning rate at ``step``, which counts from 1.

        Between 0 and 1; it reaches 1 at the end of the warm-up and ``min_ratio`` or more at
        ``total_steps``. Defined for every step from 1 on, those past ``total_steps`` too.
        """
