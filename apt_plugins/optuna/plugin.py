"""Makes a run a trial of a study: it tells what its evaluations find, and stops when told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from apt_core import PluginInfo, Priority, hookimpl

PLUGIN = PluginInfo(
    summary="a trial of apt-tune: reports its evaluations, pauses and is pruned; idle elsewhere",
    version="1.0.0",
)
NAME = "optuna"


class Watching(Protocol):
    """What a study learns from the run of a trial. Each answer is a reason to stop, or empty."""

    def started(self, trainer: Any) -> str:
        """The run begins or goes on."""

    def stepped(self, step: int) -> str:
        """A step was taken."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> str:
        """The held-out text was scored after ``step``."""


class Plugin:
    """The trial that a run is. Without one, as when somebody else goes on with the run, it does
    nothing."""

    def __init__(self, trial: Watching | None = None) -> None:
        self._trial = trial

    @hookimpl(priority=Priority.LAST)
    def on_training_start(self, trainer: Any) -> None:
        if self._trial is not None:
            _stop(trainer, self._trial.started(trainer))

    @hookimpl(priority=Priority.LAST)
    def on_step_end(self, step: int, trainer: Any) -> None:
        if self._trial is not None:
            _stop(trainer, self._trial.stepped(step))

    @hookimpl(priority=Priority.LAST)
    def on_evaluation_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        if self._trial is not None:
            _stop(trainer, self._trial.evaluated(trainer.step, metrics))


def _stop(trainer: Any, reason: str) -> None:
    if reason:
        trainer.request_stop(reason)
