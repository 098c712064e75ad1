"""One worker of a study: trains what is to be trained next, until all trials have ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from apt_core import ConfigError
from apt_plugins.optuna.study import Study, Waiting
from apt_plugins.optuna.trial_runs import record, train
from apt_plugins.optuna.tuned import Tuned

POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Worker:
    """``count`` trials are to end. ``own`` are the profile's own values, None where the space does
    not hold them; ``threads`` and ``parent`` as :func:`~apt_plugins.optuna.trial_runs.train` takes
    them; ``tick`` is called now and then, ``look`` where a trial begins, pauses or ends."""

    tuned: Tuned
    study: Study
    count: int
    own: Mapping[str, Any] | None
    threads: int | None = None
    parent: int = 0
    tick: Callable[[], None] = lambda: None
    look: Callable[[], None] = lambda: None

    def run(self) -> int:
        """Work until nothing is left. Returns 0, or the exit code of the signal that ended it.

        Raises StorageError, and ConfigError where the profile takes no values of the space.
        """
        while True:
            work = self.study.next(self.count, self._refusal, self.own)
            if work is None:
                return 0
            if isinstance(work, Waiting):
                self.tick()
                time.sleep(POLL_SECONDS)
                continue
            self.look()
            try:
                outcome = train(
                    self.tuned,
                    self.study,
                    work,
                    threads=self.threads,
                    tick=self.tick,
                    parent=self.parent,
                )
                record(self.study, work, outcome)
            finally:
                work.lock.close()
            self.look()
            if outcome.kind == "interrupted":
                return outcome.exit_code

    def _refusal(self, values: Mapping[str, Any]) -> ConfigError | None:
        """Why the profile refuses a combination of values."""
        try:
            self.tuned.boot(self.study.space.overrides(values))
        except ConfigError as error:
            return error
        return None
