"""What an evaluation finds of each item of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from apt_core.evaluation.intervals import Sums


@dataclass(frozen=True, eq=False)
class Found:
    """For each metric the numerators and denominators [n, 2] of n ``units`` (items, documents or
    windows); ``too_long`` counts items whose end does not see their beginning; ``precision`` is the
    type in which the model computed."""

    sums: Mapping[str, Sums]
    precision: str
    units: str = "items"
    too_long: int = 0
