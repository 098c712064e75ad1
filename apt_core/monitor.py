"""What a person sees while a run trains: a live bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import inf, isfinite, isnan
from typing import TYPE_CHECKING, Any

from apt_core.metric_names import CROSS_ENTROPY

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

PLAIN_LINE_SECONDS = 5.0
"""In a pipe, a line is printed at most this often."""


def duration(seconds: float) -> str:
    """``75.2 -> '1:15'``, ``3_700 -> '1:01:40'``; of a clock that was set back ``'-0:05'``."""
    if not isfinite(seconds):
        return str(seconds)
    if seconds <= -1:
        return f"-{duration(-seconds)}"
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def rate(per_second: float) -> str:
    """``12_345 -> '12.3k'``."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if per_second >= size:
            return f"{per_second / size:.1f}{unit}"
    return f"{per_second:.0f}"


class Throughput:
    """Tokens per second since the last reading. Time spent in ``pause`` .. ``resume`` is left out,
    so that evaluation and saving do not count as training."""

    def __init__(self) -> None:
        self._tokens = 0
        self._read_tokens, self._read_seconds = 0, 0.0
        self._start = time.perf_counter()
        self._pauses, self._paused_at = 0, 0.0

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def pause(self) -> None:
        """Stop the clock; pauses may lie within each other."""
        if self._pauses == 0:
            self._paused_at = time.perf_counter()
        self._pauses += 1

    def resume(self) -> None:
        self._pauses -= 1
        if self._pauses == 0:
            self._start += time.perf_counter() - self._paused_at

    def read(self) -> float:
        """Tokens per second since the last call."""
        now = self._now()
        seconds, tokens = now - self._start, self._tokens
        self._read_tokens += tokens
        self._read_seconds += seconds
        self._start, self._tokens = now, 0
        return tokens / seconds if seconds > 0 else 0.0

    def overall(self) -> tuple[int, float]:
        """Tokens since the beginning, and the seconds that they took."""
        tokens = self._read_tokens + self._tokens
        return tokens, self._read_seconds + self._now() - self._start if tokens else 0.0

    def _now(self) -> float:
        return self._paused_at if self._pauses else time.perf_counter()


class ProgressDisplay:
    """Shows loss, tokens/s, the share of the device's peak, and the time that is left.

    ``total_steps`` is the step that the run ends with, ``max_seconds`` the time that ends it
    earlier. On a terminal it is one live bar; elsewhere plain lines at intervals, so that logs of
    a job stay readable. Without a console it shows nothing.
    """

    def __init__(
        self,
        console: Console | None,
        total_steps: int,
        max_epochs: int,
        max_seconds: float | None = None,
    ) -> None:
        self._console = console
        self._total = total_steps
        self._epochs = max_epochs
        self._max_seconds = inf if max_seconds is None else max_seconds
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._started = 0.0
        self._first_step = 0
        self._last_line = float("-inf")

    def start(self, step: int) -> None:
        self._started, self._first_step = time.perf_counter(), step
        if self._console is None or not self._console.is_interactive:
            return
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            transient=True,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=self._total, completed=step, figures="")
        self._progress.start()

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def update(self, step: int, epoch: int, row: Mapping[str, Any]) -> None:
        """Show a row of metrics: the cross-entropy, ``lr``, ``tokens_per_s``, and where it has them
        the ``loss`` with the terms of plugins, ``mfu`` and ``skipped_steps``."""
        if self._console is None:
            return
        loss, entropy = row["loss"], row.get(CROSS_ENTROPY, row["loss"])
        parts = [f"loss {entropy:.3f}", f"lr {row['lr']:.1e}",
                 f"{rate(row['tokens_per_s'])} tok/s"]  # fmt: skip
        if loss != entropy and not (isnan(loss) and isnan(entropy)):
            parts[0] += f" ({loss:.3f} with terms)"
        if "mfu" in row:
            parts.append(f"mfu {row['mfu']:.0%}")
        if "skipped_steps" in row:
            parts.append(f"skipped {row['skipped_steps']}")
        figures = "  ".join([*parts, f"left {duration(self._seconds_left(step))}"])
        name = f"epoch {epoch}/{self._epochs}"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, description=name, figures=figures)
            return
        now = time.perf_counter()
        if now - self._last_line >= PLAIN_LINE_SECONDS or step == self._total:
            self._last_line = now
            line = f"{name}  step {step}/{self._total}  {figures}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _seconds_left(self, step: int) -> float:
        done = step - self._first_step
        elapsed = time.perf_counter() - self._started
        left = elapsed / done * (self._total - step) if done else 0.0
        return max(0.0, min(left, self._max_seconds - elapsed))
