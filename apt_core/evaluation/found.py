"""How the items of a task are asked, and what is found of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from apt_core.evaluation.intervals import Sums


def _never() -> bool:
    return False


def _nobody(share: float) -> None:
    pass


@dataclass(frozen=True)
class Asking:
    """The ``batch_size`` of forwards, the ``stride`` of windows (None: half of the context),
    whether to stop (``interrupted``), what to tell which share is done (``advance``), and the
    context in which the code of the task judges (``judging``)."""

    batch_size: int = 16
    stride: int | None = None
    interrupted: Callable[[], bool] = _never
    advance: Callable[[float], None] = _nobody
    judging: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True, eq=False)
class Found:
    """For each metric the numerators and denominators [n, 2] of n ``units`` (items, documents or
    windows); ``too_long`` counts items whose end does not see their beginning; ``precision`` is the
    type in which the model computed."""

    sums: Mapping[str, Sums]
    precision: str
    units: str = "items"
    too_long: int = 0
