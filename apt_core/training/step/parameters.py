"""Scheduled parameters in the step at hand."""

from __future__ import annotations

from typing import Any

from apt_core.runs.run_state import Progress
from apt_core.schedules import Schedule


class ScheduledParameters:
    """The values that ``schedule`` gives in the step that :meth:`begin` named."""

    def __init__(self, schedule: Schedule, progress: Progress) -> None:
        self._schedule, self._progress = schedule, progress
        self.begin(progress.step)

    def begin(self, step: int) -> None:
        """``step`` is at hand, or about to be: the tokens of the steps before it count."""
        self._at = step, self._progress.tokens

    def value(self, name: str, default: Any = None) -> Any:
        """The value of a parameter; ``default`` if the profile gives it none."""
        step, tokens = self._at
        return self._schedule.get_param(
            name, epoch=self._progress.epoch, step=step, tokens=tokens, default=default
        )
