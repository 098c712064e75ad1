"""Trains a trial from where it is to where it is to be compared."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from optuna.trial import TrialState

from apt_core.config import Override
from apt_core.error_text import one_line
from apt_core.errors import AptError, ConfigError, DivergedError
from apt_core.kernel import Kernel
from apt_core.plugin_manager import PluginManager
from apt_plugins.optuna import records
from apt_plugins.optuna.plugin import NAME, Plugin
from apt_plugins.optuna.records import run_folder
from apt_plugins.optuna.rungs import step_of
from apt_plugins.optuna.storage import StorageError
from apt_plugins.optuna.study import Study, Work
from apt_plugins.optuna.tuned import Tuned

SURROUNDINGS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE)
"""Errors that every other trial would meet too."""

TICK_SECONDS = 0.5


@dataclass(frozen=True)
class Outcome:
    """How a trial's training went. ``kind`` is paused, complete, pruned, failed or interrupted;
    ``value`` is the objective there."""

    kind: Literal["paused", "complete", "pruned", "failed", "interrupted"]
    step: int = 0
    value: float | None = None
    reason: str = ""
    diverged: bool = False
    exit_code: int = 0


class Watch:
    """Reports a trial to its study, and stops it at its rung, where it is worse than others, and
    when nobody waits for it any more."""

    def __init__(self, study: Study, work: Work, tick: Callable[[], None], parent: int) -> None:
        self._study, self._work, self._tick, self._parent = study, work, tick, parent
        self._share = study.settings.rungs[work.target]
        self._until: int | None = None
        self._total: int | None = None
        self._ticked = 0.0
        self.paused = self.pruned = False
        self.orphaned = False
        self.failure: StorageError | None = None

    def started(self, trainer: Any) -> str:
        """Learn how long the trial is, and record which trial the run is."""
        self._total = trainer.schedule.horizon.last("step")
        if self._share < 1.0 and self._total is not None:
            until = step_of(self._share, self._total)
            self._until = until if until < self._total else None
        trainer.folder.write_manifest(
            trial={
                "study": self._study.name,
                "folder": str(self._study.folder.absolute()),
                "number": self._work.number,
                "params": dict(self._work.params),
            }
        )
        self._tell(lambda: self._study.note(self._work.trial_id, total_steps=self._total))
        return self.stepped(trainer.step) or self._stopped()

    def stepped(self, step: int) -> str:
        """Stop at the rung."""
        now = time.monotonic()
        if now - self._ticked >= TICK_SECONDS:
            self._ticked = now
            self._tick()
            if self._parent and os.getppid() != self._parent:
                self.orphaned = True
                return "the command that started this worker has ended"
        if self._until is not None and step >= self._until and not self.paused:
            self.paused = True
            return f"the trial pauses after {self._share:.3g} of its steps"
        return ""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> str:
        """Report the objective; a pruner may end the trial."""
        value = metrics.get(self._study.settings.metric)
        if not step or value is None or not isfinite(value):
            return ""
        self._tell(lambda: self._report(step, float(value)))
        self._tick()
        return self._stopped()

    def _report(self, step: int, value: float) -> None:
        self._study.report(self._work.trial_id, step, value)
        self._study.note(self._work.trial_id, step=step)
        last = self._total is not None and step >= self._total
        if not last and not self.paused and self._study.is_worse(self._work.trial_id):
            self.pruned = True

    def _tell(self, report: Callable[[], None]) -> None:
        """Report; a storage that fails ends the training, which goes on when the study does."""
        try:
            report()
        except StorageError as error:
            self.failure = self.failure or error

    def _stopped(self) -> str:
        if self.failure is not None:
            return str(self.failure)
        return f"{self._study.settings.pruner}: it is worse than others" if self.pruned else ""


def train(
    tuned: Tuned,
    study: Study,
    work: Work,
    *,
    threads: int | None,
    tick: Callable[[], None],
    parent: int = 0,
) -> Outcome:
    """Train a trial to its target, from its newest checkpoint if it has one.

    ``threads`` are the CPU threads of a trial that the profile leaves to torch; ``parent`` is the
    process whose end ends the training. Raises StorageError, and AptError for what ails every
    trial; whatever ails this one is in the outcome.
    """
    watch = Watch(study, work, tick, parent)
    try:
        result = _fit(tuned, study, work, watch, threads)
    except KeyboardInterrupt as interrupt:
        return Outcome("interrupted", exit_code=getattr(interrupt, "exit_code", 130))
    except Exception as error:
        if watch.failure is not None:
            raise watch.failure from error
        if isinstance(error, OSError) and error.errno in SURROUNDINGS:
            place = error.filename or study.folder
            raise AptError(
                f"{place}: {error.strerror}; the trial goes on with the study"
            ) from error
        return Outcome("failed", reason=_reason(error), diverged=isinstance(error, DivergedError))
    if watch.failure is not None:
        raise watch.failure
    if result.status == "interrupted":
        return Outcome("interrupted", result.step, exit_code=result.exit_code)
    if watch.orphaned:
        return Outcome("interrupted", result.step, exit_code=143)
    value = result.figures.get(study.settings.metric)
    if value is None:
        known = ", ".join(name for name in result.figures if name.startswith(("val_", "task/")))
        reason = f"its evaluations have no {study.settings.metric} (they have {known})"
        return Outcome("failed", result.step, reason=reason)
    if not isfinite(value):
        reason = f"{study.settings.metric} is {value} after step {result.step:,}"
        return Outcome("failed", result.step, reason=reason, diverged=True)
    kind: Literal["paused", "pruned", "complete"] = (
        "pruned" if watch.pruned else "paused" if watch.paused else "complete"
    )
    return Outcome(kind, result.step, float(value), reason=result.reason)


def _fit(tuned: Tuned, study: Study, work: Work, watch: Watch, threads: int | None) -> Any:
    from apt_core.modeling.placement import num_threads
    from apt_core.training import Trainer

    overrides = study.space.overrides(work.params)
    threads = work.attrs.get(records.THREADS, threads)
    kernel = _booted(tuned, overrides, watch)
    if threads is not None and num_threads(kernel.config) is None:
        # Recorded, for the last bits of a result depend on it.
        study.note(work.trial_id, threads=threads)
        key = ("hardware", "num_threads")
        kernel = _booted(tuned, [*overrides, Override(key, threads, "--workers")], watch)
    folder = run_folder(study.folder, work.number)
    begun = (folder / "manifest.json").is_file() or (folder / "checkpoints").is_dir()
    return Trainer(kernel, output=folder, resume=begun).fit()


def _booted(tuned: Tuned, overrides: Sequence[Override], watch: Watch) -> Kernel:
    manager = PluginManager(strict=tuned.strict)
    manager.register(Plugin(watch), NAME)
    return tuned.boot(overrides, manager)


def _reason(error: Exception) -> str:
    if isinstance(error, ConfigError):
        return f"bad values: {'; '.join(map(str, error.problems))}"
    if isinstance(error, AptError):
        return str(error)
    return f"unexpected failure: {one_line(error)}"


def record(study: Study, work: Work, outcome: Outcome) -> None:
    """Record the outcome in the study."""
    if outcome.kind == "interrupted":
        study.note(work.trial_id, attempts=0)
    elif outcome.kind == "failed":
        if outcome.diverged:
            study.note(work.trial_id, diverged=True)
        study.end(work.number, TrialState.FAIL, reason=outcome.reason)
    else:
        assert outcome.value is not None
        study.report(work.trial_id, outcome.step, outcome.value)
        study.note(work.trial_id, step=outcome.step)
        if outcome.kind == "paused":
            rungs = {**_rungs(work), str(work.target): outcome.value}
            study.note(work.trial_id, rungs=rungs, status=records.PAUSED)
        elif outcome.kind == "pruned":
            study.end(work.number, TrialState.PRUNED, reason=outcome.reason)
        else:
            study.end(work.number, TrialState.COMPLETE, outcome.value)


def _rungs(work: Work) -> Mapping[str, float]:
    found = work.attrs.get(records.RUNGS)
    return found if isinstance(found, dict) else {}
