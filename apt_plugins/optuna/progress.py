"""Says how a study gets on: a line that is redrawn in a terminal, else a line for each event."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from apt_core.cli.output import make_console
from apt_core.monitor import duration
from apt_core.printable import printable
from apt_plugins.optuna.records import TrialRow, best_of
from apt_plugins.optuna.settings import Settings

if TYPE_CHECKING:
    from apt_plugins.optuna.study import Study

ENDED = ("complete", "pruned", "failed")
SHOWN_RUNNING = 4
REDRAW_SECONDS = 0.5
SHOWN_VALUES = 6


class Progress:
    """Prints what has changed in a study since it was looked at last, on ``stream``.

    ``count`` trials are to end. ``clock`` gives seconds, for the time that is left.
    """

    def __init__(
        self,
        study: Study,
        count: int,
        stream: TextIO,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._study, self._count, self._clock = study, count, clock
        self._console = make_console(stream)
        self._live: Any = None
        self._seen: dict[int, tuple[str, int]] = {}
        self._looked = 0.0
        self._began: tuple[float, int] | None = None

    def __enter__(self) -> Progress:
        for row in self._study.rows():  # what others did before is in the table at the end
            self._seen[row.number] = _mark(row)
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def tick(self) -> None:
        """Look at the study, unless that was done a moment ago."""
        if self._clock() - self._looked >= REDRAW_SECONDS:
            self.look()

    def look(self) -> None:
        """Print what is new."""
        self._looked = self._clock()
        rows = self._study.rows()
        for row in rows:
            if row.state == "running" and not row.params:
                continue  # its values are being chosen
            before, now = self._seen.get(row.number), _mark(row)
            if before != now:
                self._seen[row.number] = now
                self._console.print(event_line(row, before, self._study.settings), markup=False)
        if self._live is not None:
            self._live.update(self._line(rows), refresh=True)

    def _line(self, rows: Sequence[TrialRow]) -> Any:
        from rich.text import Text

        ended = sum(row.state in ENDED for row in rows)
        if self._began is None:
            self._began = self._clock(), ended
        words = [f"{ended} of {self._count} ended"]
        running = [row for row in rows if row.state == "running"]
        words += [
            f"trial {row.number}: step {row.step:,}"
            + (f" of {row.total_steps:,}" if row.total_steps else "")
            + (f", {row.value:.4g}" if row.value is not None else "")
            for row in running[:SHOWN_RUNNING]
        ]
        best = best_of(rows, maximize=self._study.settings.maximize)
        if best is not None:
            words.append(f"best {self._study.settings.metric} {best.value:.4g} ({best.number})")
        began, first = self._began
        if ended > first:
            left = (self._clock() - began) / (ended - first) * (self._count - ended)
            words.append(f"{duration(left)} left")
        return Text(printable(" · ".join(words)), no_wrap=True, overflow="ellipsis")


def event_line(row: TrialRow, before: tuple[str, int] | None, settings: Settings) -> str:
    """One line on what has happened to a trial."""
    of = f" of {row.total_steps:,}" if row.total_steps else ""
    value = "" if row.value is None else f", {settings.metric} {row.value:.5g}"
    if row.state == "running":
        if before is None or not row.step:
            which = "the profile itself: " if row.baseline else ""
            return f"trial {row.number}: begins with {which}{values_text(row)}"
        return f"trial {row.number}: goes on from step {row.step:,}{of}"
    if row.state == "failed":
        return f"trial {row.number}: failed: {row.reason}"
    word = {"paused": "paused at", "pruned": "pruned at", "complete": "complete,"}[row.state]
    return f"trial {row.number}: {word} step {row.step:,}{of}{value}"


def values_text(row: TrialRow, limit: int = SHOWN_VALUES) -> str:
    """The values of a trial on one line."""
    words = [f"{key}={value_text(value)}" for key, value in row.params.items()]
    more = [f"and {len(words) - limit} more"] if len(words) > limit else []
    return ", ".join([*words[:limit], *more]) or "no values"


def value_text(value: Any) -> str:
    """A value as it is shown: a float by its first figures.

    >>> value_text(0.000312345678), value_text(12), value_text(None)
    ('0.0003123', '12', 'null')
    """
    if value is None:
        return "null"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _mark(row: TrialRow) -> tuple[str, int]:
    """What a line is printed for, when it differs: the state, and in which rung it holds."""
    return row.state, row.step if row.state != "running" else 0
