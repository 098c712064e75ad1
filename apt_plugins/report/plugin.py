"""Writes ``report.html`` into the folder of the run."""

from __future__ import annotations

import time
from typing import Any

from apt_core import PluginInfo, Priority, hookimpl

PLUGIN = PluginInfo(
    observer=True,
    summary="a page on each run: curves, timeline, samples; apt-report FOLDER writes it again",
    version="1.0.0",
    requires=("jinja2>=3.1",),
)

WRITING_SHARE = 0.01
"""An epoch's end writes the page only where that costs at most this share of the time."""

ASSUMED_SECONDS = 0.3
"""Assumed cost of the first page, so that a short run writes none before its end."""


class Budget:
    """Decides from the cost of the last page whether another one in mid-run is cheap enough."""

    def __init__(self, now: float) -> None:
        self._written_at = now
        self._seconds = ASSUMED_SECONDS

    def allows(self, now: float) -> bool:
        return (now - self._written_at) * WRITING_SHARE >= self._seconds

    def spent(self, start: float, end: float) -> None:
        self._written_at, self._seconds = end, end - start


class Plugin:
    """The page of one run."""

    def __init__(self) -> None:
        self._budget = Budget(time.perf_counter())

    def write(self, trainer: Any) -> None:
        """Write the page of the trainer's run, in the main process only."""
        if trainer.rank != 0:
            return
        from apt_plugins.report.page import write_report

        start = time.perf_counter()
        write_report(trainer.output_dir)
        self._budget.spent(start, time.perf_counter())

    @hookimpl(priority=Priority.LAST)
    def on_epoch_end(self, trainer: Any) -> None:
        if self._budget.allows(time.perf_counter()):
            self.write(trainer)

    @hookimpl(priority=Priority.LAST)
    def on_training_end(self, trainer: Any) -> None:
        self.write(trainer)

    @hookimpl(priority=Priority.LAST)
    def on_exception(self, trainer: Any) -> None:
        self.write(trainer)
