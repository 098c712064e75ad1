"""Timing of hook calls, for ``apt-hooks trace``: off, it costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean

from apt_core.hook_plans import HookPlans


@dataclass(frozen=True)
class TraceRow:
    """Calls of one plugin's implementation of one hook."""

    hook: str
    plugin: str
    calls: int
    total_ms: float
    mean_us: float
    max_us: float


@contextmanager
def traced() -> Iterator[Callable[[], list[TraceRow]]]:
    """Every manager that is made inside times its calls; yields a function that sums them up."""
    timings: dict[tuple[str, str], list[float]] = {}
    HookPlans.shared_timings = timings
    try:
        yield lambda: [
            TraceRow(
                hook,
                plugin,
                len(seconds),
                round(sum(seconds) * 1e3, 2),
                round(mean(seconds) * 1e6, 1),
                round(max(seconds) * 1e6, 1),
            )
            for (hook, plugin), seconds in timings.items()
            if seconds
        ]
    finally:
        HookPlans.shared_timings = None
