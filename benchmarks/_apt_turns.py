"""APT's trainer as a loop that takes turns, see ``_turns``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import nn

from _turns import Loop
from apt_core.data.batches import BatchPlan, Step
from apt_core.training import Trainer

STEP = BatchPlan.step


class _Plans(threading.local):
    fetched: Callable[[], None]


PLANS = _Plans()
"""The callback of each thread, which the batch plan of its trainer calls before every fetch."""


def trainer_loop(make: Callable[[], Trainer], *, skip: int = 0) -> Loop[nn.Module]:
    """A whole run of the trainer that ``make`` returns; its turns begin after ``skip`` steps."""

    def loop(fetched: Callable[[], None]) -> nn.Module:
        left = skip

        def skip_or_fetch() -> None:
            nonlocal left
            if left:
                left -= 1
            else:
                fetched()

        PLANS.fetched = skip_or_fetch
        trainer = make()
        trainer.fit()
        return trainer.model

    return loop


@contextmanager
def patched_fetches() -> Iterator[None]:
    """Patch batch plans to call ``PLANS.fetched`` before each fetch, where a trainer's turn ends.

    The patch adds no code to the trainer's step, and no plugin.
    """

    def step(plan: BatchPlan, epoch: int, index: int) -> Step:
        PLANS.fetched()
        return STEP(plan, epoch, index)

    with patch.object(BatchPlan, "step", step):
        yield
