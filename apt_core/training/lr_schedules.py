"""The core's learning-rate schedules."""

from __future__ import annotations

import math

from apt_core.providers.lr_schedule import LRScheduleProvider


class CosineProvider(LRScheduleProvider):
    """A linear rise over the warm-up, then half a cosine down to ``min_ratio``."""

    name = "cosine"

    def factor(
        self, step: int, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0
    ) -> float:
        if step <= warmup_steps:
            return step / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
