"""When a run ends before its last step."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf, isfinite

from apt_core.config import Config
from apt_core.error_text import shown
from apt_core.monitor import duration
from apt_core.runs.run_state import StoppingState
from apt_core.training.signals import Interrupts


class Stopping:
    """Why the run should stop, or nothing: a request, a limit, a signal.

    ``agreed`` is what all the processes of the run have found out together; a process that alone
    wants to stop goes on until the others know. ``tell`` is called with the reason, once.
    """

    def __init__(
        self,
        config: Config,
        stop_at_step: int | None,
        *,
        alone: bool,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        training = config.training
        self.interrupts = Interrupts(alone=alone)
        self.reason = ""
        self._tell = tell
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
        """Stop after this step; the first reason is kept, of whatever a plugin gave one line."""
        if self.reason:
            return
        self.reason = shown(reason)
        if self._tell is not None:
            self._tell(self.reason)

    @property
    def wanted(self) -> bool:
        """Does this process want to stop?"""
        return bool(self.reason or self.interrupts)

    @property
    def due(self) -> bool:
        """Do all of them stop now?"""
        return self.wanted if self._alone else self.agreed

    @property
    def interrupted(self) -> bool:
        """Did a signal ask to stop, as far as one process may act on it by itself?"""
        return bool(self.interrupts) and self._alone

    def last_step(self, total_steps: int) -> int:
        """The step that the run ends with, as far as steps tell; of the profile it is
        ``total_steps``."""
        return min(total_steps, self._stop_at_step or total_steps)

    def check_limits(self, step: int) -> None:
        """Request a stop where a limit is reached."""
        if self._stop_at_step is not None and step >= self._stop_at_step:
            self._stop_all(f"step {step} reached, where it was told to stop")
        if self._max_seconds is not None and time.monotonic() - self._started >= self._max_seconds:
            self.request(f"training.max_seconds reached ({duration(self._max_seconds)})")

    def _stop_all(self, reason: str) -> None:
        """Request a stop for a reason that every process finds at the same step."""
        self.request(reason)
        self.agreed = True

    def judge(self, loss: float, step: int, *, final: bool = False) -> None:
        """Take in the loss of an evaluation after ``step``. NaN is never better.

        Patience does not count a ``final`` one: the run may go on, and would not have had it.
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
        """Go on judging, or begin anew where the losses were measured on something else than
        ``watched``, and return False."""
        self.judged_step = state.judged_step
        if state.watched != watched:
            return False
        self._reference = inf if state.reference is None else state.reference
        self._since = state.since
        self._check_patience()
        return True
