"""Evaluates scheduled parameters in the present step."""

from __future__ import annotations

from typing import Any

from apt_core.runs.run_state import Progress
from apt_core.schedules import Schedule


class ScheduledParameters:
    """The values of ``schedule`` in the step that :meth:`begin` named."""

    def __init__(self, schedule: Schedule, progress: Progress) -> None:
        self._schedule, self._progress = schedule, progress
        self.begin(progress.step)

    def begin(self, step: int) -> None:
        """Make ``step``, the present or the next one, the step of :meth:`value`. The tokens of the
        steps before it count."""
        self._at = step, self._progress.tokens

    def value(self, name: str, default: Any = None) -> Any:
        """The value of a parameter; ``default`` if the profile does not schedule it."""
        step, tokens = self._at
        return self._schedule.get_param(
            name, epoch=self._progress.epoch, step=step, tokens=tokens, default=default
        )
