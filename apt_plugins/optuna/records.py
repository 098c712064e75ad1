"""What a study keeps about its trials beside what Optuna does: names of the attributes, and trials
as they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

STATUS = "status"
"""Of a trial that has not ended: running or paused."""
PAUSED, RUNNING = "paused", "running"
FOLDER = "folder"
PLACE = "place"
"""The folder of the study that has the trial's run: machines need not share it."""
BRACKET = "bracket"
RUNGS = "rungs"
"""The objective at each rung that the trial has come to."""
TARGET = "target"
"""The rung to which the trial trains."""
STEP, TOTAL = "step", "total_steps"
THREADS = "threads"
BASELINE = "baseline"
REASON = "reason"
DIVERGED = "diverged"
SURPLUS = "surplus"
ATTEMPTS, ATTEMPT_STEP = "attempts", "attempt_step"


@dataclass(frozen=True)
class TrialRow:
    """A trial as it is shown. ``state`` is one of running, paused, complete, pruned and failed;
    ``value`` is its newest objective, None before the first."""

    number: int
    state: str
    params: Mapping[str, Any]
    value: float | None
    step: int
    total_steps: int | None
    reason: str
    folder: str
    baseline: bool
    curve: tuple[tuple[int, float], ...]
    seconds: float | None

    def row(self) -> dict[str, Any]:
        """The trial as JSON values."""
        return {
            "number": self.number,
            "state": self.state,
            "value": self.value,
            "step": self.step,
            "total_steps": self.total_steps,
            "params": dict(self.params),
            "reason": self.reason,
            "folder": self.folder,
            "baseline": self.baseline,
        }


def is_paused(trial: FrozenTrial) -> bool:
    """Whether the trial is to be continued, or not, by a later decision."""
    return not trial.state.is_finished() and trial.user_attrs.get(STATUS) == PAUSED


def trial_row(trial: FrozenTrial) -> TrialRow:
    """A trial as it is shown."""
    attrs = trial.user_attrs
    names = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    state = names.get(trial.state.name, "paused" if is_paused(trial) else "running")
    curve = tuple(sorted(trial.intermediate_values.items()))
    value = trial.value if state == "complete" else curve[-1][1] if curve else None
    begun, ended = trial.datetime_start, trial.datetime_complete
    return TrialRow(
        number=trial.number,
        state=state,
        params=trial.params,
        value=value if value is not None and isfinite(value) else None,
        step=int(attrs.get(STEP, curve[-1][0] if curve else 0)),
        total_steps=attrs.get(TOTAL),
        reason=str(attrs.get(REASON, "")),
        folder=str(attrs.get(FOLDER, "")),
        baseline=bool(attrs.get(BASELINE)),
        curve=curve,
        seconds=(ended - begun).total_seconds() if begun and ended else None,
    )


def best_of(rows: Sequence[TrialRow], *, maximize: bool) -> TrialRow | None:
    """The best of the trials that have trained to their end; None where there is none."""
    done = [row for row in rows if row.state == "complete" and row.value is not None]
    sign = -1.0 if maximize else 1.0
    return min(done, key=lambda row: (sign * (row.value or 0.0), row.number), default=None)


def run_folder(study: Path, number: int) -> Path:
    """The run of a trial, in the study's folder."""
    return study / "trials" / f"{number:04d}"
