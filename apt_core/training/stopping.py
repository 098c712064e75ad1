"""Decides whether a run ends before its last step."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf, isfinite

from apt_core.config import Config
from apt_core.error_text import shown
from apt_core.monitor import duration
from apt_core.parallel.signals import Interrupts
from apt_core.runs.run_state import StoppingState


class Stopping:
    """Collects the reasons to stop: a request, a limit, a signal.

    ``agreed`` is true once all processes of the run know of the stop; a process that wants to stop
    goes on until then. ``report`` is called once with the reason.
    """

    def __init__(
        self,
        config: Config,
        stop_at_step: int | None,
        *,
        alone: bool,
        report: Callable[[str], None] | None = None,
    ) -> None:
        training = config.training
        self.interrupts = Interrupts(alone=alone)
        self.reason = ""
        self._report = report
        self.agreed = False
        self._alone = alone
        self._max_seconds = training.max_seconds
        self._stop_at_step = stop_at_step
        self._started = time.monotonic()
        self._patience = training.early_stopping_patience
        self._min_delta = training.early_stopping_min_delta
        self._reference, self._since = inf, 0
        self.judged_step = 0

    def request(self, reason: str) -> None:
        """Stop after this step. The first reason is kept, cut to one line."""
        if self.reason:
            return
        self.reason = shown(reason)
        if self._report is not None:
            self._report(self.reason)

    @property
    def wanted(self) -> bool:
        """Whether this process wants to stop."""
        return bool(self.reason or self.interrupts)

    @property
    def due(self) -> bool:
        """Whether the run stops now, in all processes."""
        return self.wanted if self._alone else self.agreed

    @property
    def interrupted(self) -> bool:
        """Whether a signal asked to stop and this process may act on it without the others."""
        return bool(self.interrupts) and self._alone

    def last_step(self, total_steps: int) -> int:
        """The last step of this part of the run, apart from limits of time and patience;
        ``total_steps`` is the last one of the profile."""
        return min(total_steps, self._stop_at_step or total_steps)

    def check_limits(self, step: int) -> None:
        """Request a stop if a limit is reached."""
        if self._stop_at_step is not None and step >= self._stop_at_step:
            self._stop_all(f"step {step} reached, where it was told to stop")
        if self._max_seconds is not None and time.monotonic() - self._started >= self._max_seconds:
            self.request(f"training.max_seconds reached ({duration(self._max_seconds)})")

    def _stop_all(self, reason: str) -> None:
        """Stop for a reason that every process finds at the same step."""
        self.request(reason)
        self.agreed = True

    def judge(self, loss: float, step: int, *, final: bool = False) -> None:
        """Compare the loss of an evaluation after ``step`` with the best before. NaN is never
        better.

        A ``final`` evaluation is ignored: it is made only because the run ends, so a resume that
        continues must not count it.
        """
        if final or step == self.judged_step:
            return
        self.judged_step = step
        if loss < self._reference - self._min_delta:
            self._reference, self._since = loss, 0
        else:
            self._since += 1
        self._check_patience()

    def _check_patience(self) -> None:
        if self._patience is not None and self._since >= self._patience:
            self._stop_all(f"no better validation loss in {self._since} evaluations")

    def state(self, watched: str) -> StoppingState:
        """What a checkpoint keeps, for :meth:`load`. The losses were measured on ``watched``."""
        return StoppingState(
            watched=watched,
            reference=self._reference if isfinite(self._reference) else None,
            since=self._since,
            judged_step=self.judged_step,
        )

    def load(self, state: StoppingState, watched: str) -> bool:
        """Restore ``state``. Returns False, and begins anew, if its losses were measured on other
        windows than ``watched``."""
        self.judged_step = state.judged_step
        if state.watched != watched:
            return False
        self._reference = inf if state.reference is None else state.reference
        self._since = state.since
        self._check_patience()
        return True
