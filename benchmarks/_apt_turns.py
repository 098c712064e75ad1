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
"""Whom the batch plan of a thread's trainer tells of every fetch."""


def trainer_loop(make: Callable[[], Trainer], *, skip: int = 0) -> Loop[nn.Module]:
    """A run of the trainer that ``make`` gives, whose turns begin after ``skip`` steps."""

    def loop(fetched: Callable[[], None]) -> nn.Module:
        left = skip

        def told() -> None:
            nonlocal left
            if left:
                left -= 1
            else:
                fetched()

        PLANS.fetched = told
        trainer = make()
        trainer.fit()
        return trainer.model

    return loop


@contextmanager
def handing_over() -> Iterator[None]:
    """Trainers hand over where they fetch a batch: there is no other place that is neither their
    own code nor a plugin."""

    def step(plan: BatchPlan, epoch: int, index: int) -> Step:
        PLANS.fetched()
        return STEP(plan, epoch, index)

    with patch.object(BatchPlan, "step", step):
        yield
