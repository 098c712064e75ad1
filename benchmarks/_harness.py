"""Shared by all benchmarks: flags, timing of sides in turns, and the file of figures.

A benchmark is a script that answers one question. It ends in ::

    if __name__ == "__main__":
        run("What does a guarded hook call cost?", measure, packages=["pluggy"])

where ``measure(report, quick)`` fills the report::

    def measure(report: Report, quick: bool) -> None:
        times = interleave({"guarded": guarded, "stock": stock}, baseline="stock", rounds=50)
        report.ratio("guarded_over_stock", times, "guarded", over="stock")
        report.noise("stock_over_stock", times)

``report.table``, ``report.plot`` and ``report.note`` add tables, plots and text to the figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import repeat
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from render import cell, facts, figure, interval

RESAMPLES = 2000
"""Bootstrap resamples behind every interval."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of two medians and its 95% interval, by bootstrap over the rounds."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Timings:
    """``samples``: nanoseconds per call of each side, one value per round. ``again`` holds a second
    sample of the ``baseline`` in each round, for the A/A comparison."""

    samples: Mapping[str, Sequence[float]]
    baseline: str
    again: Sequence[float]
    calls: int

    def median(self, side: str) -> float:
        """The median time of one call, in nanoseconds."""
        return statistics.median(self.samples[side])

    def ratio(self, side: str, over: str) -> Ratio:
        """The time of ``side`` over that of ``over``."""
        return ratio_of_medians(self.samples[side], self.samples[over])

    def noise(self) -> Ratio:
        """The baseline against itself: the ratios that the machine's noise alone makes."""
        return ratio_of_medians(self.again, self.samples[self.baseline])


def ratio_of_medians(side: Sequence[float], over: Sequence[float]) -> Ratio:
    """The ratio of the medians; rounds are resampled in pairs, since both sides of a round saw
    the same state of the machine. Raises ValueError for series that do not pair up."""
    if not side or len(side) != len(over):
        raise ValueError(f"the series differ in rounds, or have none: {len(side)} and {len(over)}")
    rng = random.Random(0)
    rounds = range(len(side))
    ratios = []
    for _ in range(RESAMPLES):
        drawn = rng.choices(rounds, k=len(rounds))
        ratios.append(
            statistics.median(side[i] for i in drawn) / statistics.median(over[i] for i in drawn)
        )
    ratios.sort()
    value = statistics.median(side) / statistics.median(over)
    return Ratio(value, ratios[int(0.025 * RESAMPLES)], ratios[int(0.975 * RESAMPLES)])


def interleave(
    sides: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    rounds: int,
    calls: int | None = None,
    warmup: int = 2,
    sample_ms: float = 2.0,
    clock: Callable[[], int] = perf_counter_ns,
) -> Timings:
    """Time all ``sides`` in turns, so that a slow moment of the machine meets each of them.

    Every round times each side once and the ``baseline`` twice, from another starting side each
    round. One sample is the mean over ``calls`` calls; without ``calls``, as many as make the
    baseline's sample last ``sample_ms`` milliseconds. ``warmup`` rounds are thrown away, and the
    garbage collector is off while a round runs. The loop's own cost (some 10 ns a call) is in
    every sample, so ratios of very short calls are slightly too near 1. For sides that do all in
    this process, ``clock=process_time_ns`` leaves out what other programs take of the processor.

    Raises ValueError when ``baseline`` is not one of the sides, or ``rounds`` or ``calls`` is
    below 1.
    """
    if baseline not in sides:
        raise ValueError(f"baseline {baseline!r} is not one of the sides: {', '.join(sides)}")
    if rounds < 1 or (calls is not None and calls < 1):
        raise ValueError(f"rounds and calls must be at least 1, not {rounds} and {calls}")
    if calls is None:
        calls = _calls_that_last(sides[baseline], sample_ms, clock)
    schedule = [*sides.items(), ("", sides[baseline])]
    samples: dict[str, list[float]] = {name: [] for name, _ in schedule}
    collecting = gc.isenabled()
    try:
        for number in range(-warmup, rounds):
            gc.collect()
            gc.disable()
            start = number % len(schedule)
            for name, call in schedule[start:] + schedule[:start]:
                elapsed = _time(call, calls, clock)
                if number >= 0:
                    samples[name].append(elapsed)
            gc.enable()
    finally:
        (gc.enable if collecting else gc.disable)()
    again = samples.pop("")
    return Timings(samples=samples, baseline=baseline, again=again, calls=calls)


def _time(call: Callable[[], object], calls: int, clock: Callable[[], int]) -> float:
    started = clock()
    for _ in repeat(None, calls):
        call()
    return (clock() - started) / calls


def _calls_that_last(
    call: Callable[[], object], milliseconds: float, clock: Callable[[], int]
) -> int:
    calls = 1
    while (elapsed := _time(call, calls, clock) * calls) < milliseconds * 1e6 / 2:
        calls *= 2
    return max(1, round(calls * milliseconds * 1e6 / elapsed))


@dataclass(frozen=True)
class Series:
    """One line of a plot; ``low`` and ``high``, where there are any, bound each ``y``."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    def __post_init__(self) -> None:
        bounded = len(self.low) == len(self.high) and len(self.low) in (0, len(self.x))
        if len(self.y) != len(self.x) or not bounded:
            raise ValueError(f"the points of series {self.label!r} do not pair up")


@dataclass
class Report:
    """The figures of one benchmark. Names are stable and carry their unit (``step_ms``) unless
    they are ratios; a benchmark may add to ``machine``, ``versions`` and ``raw``."""

    question: str
    machine: dict[str, Any]
    versions: dict[str, str]
    figures: dict[str, float] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    def add(
        self,
        name: str,
        value: float,
        *,
        spread: tuple[float, float] | None = None,
        samples: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Record a figure, with its interval and the measurements behind it where there are any.

        Raises ValueError for a name that is already there.
        """
        if name in self.figures:
            raise ValueError(f"figure {name!r} is there already")
        self.figures[name] = value
        if spread is not None:
            self.raw.setdefault("spread", {})[name] = list(spread)
        if samples is not None:
            self.raw.setdefault("samples", {})[name] = {
                side: [round(value, 1) for value in values] for side, values in samples.items()
            }

    def ratio(self, name: str, times: Timings, side: str, *, over: str) -> None:
        """Record the time of ``side`` over that of ``over``."""
        ratio = times.ratio(side, over)
        samples = {side: times.samples[side], over: times.samples[over]}
        self.add(name, ratio.value, spread=(ratio.low, ratio.high), samples=samples)

    def noise(self, name: str, times: Timings) -> None:
        """Record the A/A ratio of the baseline: differences within its interval mean nothing."""
        ratio = times.noise()
        samples = {times.baseline: times.samples[times.baseline], "again": times.again}
        self.add(name, ratio.value, spread=(ratio.low, ratio.high), samples=samples)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]
    ) -> None:
        """Record a table for the page; numbers are rounded as the figures are.

        Raises ValueError for a row whose number of cells is not that of the columns.
        """
        if any(len(row) != len(columns) for row in rows):
            raise ValueError(f"table {title!r}: every row needs {len(columns)} cells")
        table = {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}
        self.raw.setdefault("tables", []).append(table)

    def plot(
        self,
        name: str,
        title: str,
        *,
        x_label: str,
        y_label: str,
        series: Sequence[Series],
        x_scale: Literal["linear", "log"] = "linear",
        y_scale: Literal["linear", "log"] = "linear",
    ) -> None:
        """Record a plot; ``render.py`` draws it as ``docs/figures/<benchmark>-<name>.svg``.

        Raises ValueError for a name that is already there.
        """
        plots = self.raw.setdefault("plots", [])
        if any(plot["name"] == name for plot in plots):
            raise ValueError(f"plot {name!r} is there already")
        plots.append(
            {
                "name": name,
                "title": title,
                "x_label": x_label,
                "y_label": y_label,
                "x_scale": x_scale,
                "y_scale": y_scale,
                "series": [asdict(line) for line in series],
            }
        )

    def note(self, text: str) -> None:
        """Record a paragraph or list in Markdown for the page, below the figures."""
        self.raw.setdefault("notes", []).append(text)

    def write(self, path: Path) -> None:
        """Write the JSON that ``render.py`` reads."""
        content = {
            "question": self.question,
            "machine": self.machine,
            "versions": self.versions,
            "figures": self.figures,
            "raw": self.raw,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")  # a reader sees the old file or the new one
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(path)

    def show(self, console: Console) -> None:
        """Print the figures as a table."""
        table = Table("figure", title=self.question, title_justify="left")
        table.add_column("value", justify="right")
        table.add_column("interval", justify="right")
        for name, value in self.figures.items():
            table.add_row(name, figure(value), interval(self.raw.get("spread", {}).get(name)))
        console.print(table)
        for extra in self.raw.get("tables", []):
            console.print(_shown(extra))
        console.print(facts(self.machine), facts(self.versions), sep="\n", style="dim")


def _shown(table: Mapping[str, Any]) -> Table:
    shown = Table(title=table["title"], title_justify="left")
    for number, column in enumerate(table["columns"]):
        shown.add_column(column, justify="right" if number else "left")
    for row in table["rows"]:
        shown.add_row(*(cell(value) for value in row))
    return shown


def command_of(script: str, words: Sequence[str]) -> str:
    """The command that repeats a measurement: ``words`` without ``--json FILE``."""
    at = [number for number, word in enumerate(words) if word == "--json"]
    kept = [word for number, word in enumerate(words) if number not in at and number - 1 not in at]
    return shlex.join(["python", script, *kept])


def describe_machine() -> dict[str, Any]:
    """Processor, usable cores and system, on which the figures depend besides versions."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def run(
    question: str,
    measure: Callable[[Report, bool], None],
    *,
    packages: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> None:
    """Run a benchmark script: parse flags, measure, write the JSON, print the table.

    ``measure(report, quick)`` does the work; ``packages`` are the distributions whose versions
    the figures depend on.
    """
    parser = flags(question)
    options = parser.parse_args(argv)
    report = new_report(question, parser, packages)
    measure(report, options.quick)
    # Written first: a pipe that closes ends the printing.
    if options.json:
        report.write(options.json)
    report.show(Console())


def flags(question: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument(
        "--quick", action="store_true", help="few rounds: shows that it works, figures are rough"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and samples there")
    return parser


def new_report(
    question: str, parser: argparse.ArgumentParser, packages: Sequence[str] = ()
) -> Report:
    """An empty report with this machine and the versions of ``packages``; a missing package exits
    through ``parser.error``."""
    versions = {"python": platform.python_version()}
    try:
        versions |= {package: version(package) for package in ("apt-kernel", *packages)}
    except PackageNotFoundError as error:
        parser.error(f"{error.name} is missing: pip install -e '.[all,bench]' -c constraints.txt")
    return Report(question=question, machine=describe_machine(), versions=versions)
