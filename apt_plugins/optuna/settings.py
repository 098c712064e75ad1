"""What a study is told beside its profile and its space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from apt_core import Problem
from apt_plugins.optuna.rungs import bracket_of, shares

PRUNERS = ("halving", "hyperband", "median", "none")
SAMPLERS = ("tpe", "random")
CLIMBING = ("halving", "hyperband")
"""Pruners by which trials pause and go on; with the others they train in one go."""

FINAL = (1.0,)

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Settings:
    """``metric`` is the objective. ``reduction_factor`` and ``min_resource`` (the first rung, as a
    share of a trial's steps) are those of successive halving.

    With ``baseline`` the first trial has the profile's own values and always comes to its end."""

    metric: str = "val_loss"
    direction: Direction = "minimize"
    pruner: str = "halving"
    reduction_factor: int = 3
    min_resource: float = 0.1
    sampler: str = "tpe"
    seed: int = 0
    baseline: bool = True

    @property
    def maximize(self) -> bool:
        return self.direction == "maximize"

    @property
    def rungs(self) -> tuple[float, ...]:
        """Shares of a trial's steps at which it pauses, and its end."""
        if self.pruner not in CLIMBING:
            return FINAL
        return shares(self.reduction_factor, self.min_resource)

    def bracket(self, number: int) -> int:
        """The index of the first rung at which a trial pauses."""
        if self.pruner != "hyperband":
            return 0
        return bracket_of(number, len(self.rungs), self.reduction_factor)

    def row(self) -> dict[str, Any]:
        """The settings as plain data, as a study records them."""
        return asdict(self)


def changes(before: Mapping[str, Any], settings: Settings) -> Iterator[Problem]:
    """Settings that differ from those of a study's trials, which would then not compare."""
    free: tuple[str, ...] = ("seed", "sampler", "baseline")
    if settings.pruner not in CLIMBING and before.get("pruner") not in CLIMBING:
        free += ("reduction_factor", "min_resource")
    for name, value in settings.row().items():
        if name in before and before[name] != value and name not in free:
            option = f"--{name.replace('_', '-')}"
            message = f"is {value}, and the study's trials have {before[name]}"
            yield Problem(message, option, hint="put it back, or begin another: --study FOLDER")
