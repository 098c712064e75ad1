"""What every learning-rate schedule must do."""

from __future__ import annotations

import math
from typing import Any

from apt_core.testing.conformance.checks import Check

RUNS = ((1, 0, 0.0), (2, 1, 0.0), (50, 0, 0.1), (50, 10, 0.0), (50, 50, 0.1), (400, 20, 1.0))
"""(total steps, warm-up steps, lowest ratio), the ends of each range among them."""


def lr_schedule_checks(provider: Any) -> list[Check]:
    """The checks of a learning-rate schedule."""
    return [
        Check("builds", lambda: _builds(provider)),
        Check("range", lambda: _range(provider)),
        Check("warm-up", lambda: _warm_up(provider)),
        Check("end", lambda: _end(provider)),
        Check("pure", lambda: _pure(provider)),
    ]


def _builds(provider: Any) -> None:
    provider.factor(1, 10)


def _range(provider: Any) -> None:
    """Between 0 and 1 at every step, past the end too."""
    for total, warmup, ratio in RUNS:
        for step in (*range(1, total + 1), 2 * total, 100 * total):
            factor = provider.factor(step, total, warmup, ratio)
            assert math.isfinite(factor) and -1e-9 <= factor <= 1 + 1e-9, (
                f"the factor at step {step} of {total} is {factor}"
            )


def _warm_up(provider: Any) -> None:
    """It rises to 1."""
    for total, warmup, ratio in RUNS:
        rise = [provider.factor(step, total, warmup, ratio) for step in range(1, warmup + 1)]
        assert rise == sorted(rise), f"it falls within the warm-up of {warmup} steps"
        assert not rise or abs(rise[-1] - 1) < 1e-9, (
            f"after {warmup} steps of warm-up the factor is {rise[-1]}, not 1"
        )


def _end(provider: Any) -> None:
    for total, warmup, ratio in RUNS:
        last = provider.factor(total, total, warmup, ratio)
        assert last >= ratio - 1e-9, f"at the end the factor is {last}, below min_ratio {ratio}"


def _pure(provider: Any) -> None:
    """The same arguments give the same factor, in whatever order they come."""
    steps = range(1, 51)
    forward = [provider.factor(step, 50, 10, 0.1) for step in steps]
    backward = [provider.factor(step, 50, 10, 0.1) for step in reversed(steps)]
    assert forward == backward[::-1], "one step has a factor that depends on what was asked before"
