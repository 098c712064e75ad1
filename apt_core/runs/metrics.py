"""``metrics.jsonl`` as one series a key: read as a stream, for it may have a million rows."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apt_core.runs.rows import MAX_STEP, is_step, read_rows

METRICS = "metrics.jsonl"

NOT_FINITE = ("nan", "inf", "-inf")
"""How a run writes what JSON has no number for."""


@dataclass(frozen=True)
class Series:
    """Values [N] of the key ``name`` at ascending ``steps`` [N], one a step; float64."""

    name: str
    steps: NDArray[np.float64]
    values: NDArray[np.float64]


@dataclass
class Metrics:
    """Every numeric key of the ``rows``, which are counted, ``samples`` by step, ``epochs`` with the
    step that begins each; ``notes`` say what could not be read."""

    series: dict[str, Series] = field(default_factory=dict)
    samples: list[tuple[int, str]] = field(default_factory=list)
    epochs: list[tuple[int, int]] = field(default_factory=list)
    last_step: int = 0
    rows: int = 0
    notes: list[str] = field(default_factory=list)


def read_metrics(folder: Path) -> Metrics:
    """Read the metrics of the run in ``folder``, whatever state its file is in; never raises.

    Where the steps go back, a resume has begun: of what comes before it, rows of steps that were
    taken again do not count. Of two values at a step the later one does.
    """
    metrics = Metrics()
    columns: dict[str, tuple[array[int], array[float]]] = {}
    samples: list[tuple[int, str]] = []
    steps, epochs = array("q"), array("q")
    for number, row in enumerate(read_rows(folder / METRICS, metrics.notes)):
        steps.append(row["step"])
        epochs.append(row["epoch"] if is_step(row.get("epoch")) else -1)
        for key, value in row.items():
            kind = type(value)
            if kind is float or kind is int or (kind is str and value in NOT_FINITE):
                column = columns.get(key)
                if column is None:
                    column = columns[key] = (array("q"), array("d"))
                column[0].append(number)
                column[1].append(value if kind is float else as_float(value))
            elif key == "sample" and kind is str:
                samples.append((number, value))
    counted = _counted(np.frombuffer(steps, dtype=np.int64))
    at = np.frombuffer(steps, dtype=np.int64).astype(np.float64)
    metrics.rows = int(counted.sum())
    metrics.last_step = max((steps[i] for i in np.flatnonzero(counted)[-1:]), default=0)
    metrics.samples = [(steps[i], text) for i, text in samples if counted[i]]
    metrics.epochs = _first_of_each(
        (epochs[i], steps[i]) for i in np.flatnonzero(counted) if epochs[i] >= 0
    )
    for key, (numbers, values) in columns.items():
        if key not in ("step", "epoch"):
            rows = np.frombuffer(numbers, dtype=np.int64)
            kept = counted[rows]
            x, y = at[rows[kept]], np.frombuffer(values)[kept]
            last = np.append(x[1:] != x[:-1], True)[: x.size]
            metrics.series[key] = Series(key, x[last], y[last])
    return metrics


def as_float(value: float | str) -> float:
    """A number of a file; one that no float can hold is infinite."""
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return float("-inf" if isinstance(value, int) and value < 0 else "inf")


def _counted(steps: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows are of the run as it went on: those whose step no later row goes back to, or
    behind."""
    taken_again = np.full(steps.size + 1, MAX_STEP)
    back = np.flatnonzero(steps[1:] < steps[:-1]) + 1
    taken_again[back] = steps[back]
    later = np.minimum.accumulate(taken_again[::-1])[::-1][1:]
    return steps < later


def _first_of_each(rows: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Epochs with their first steps, of rows by (epoch, step)."""
    found: list[tuple[int, int]] = []
    for epoch, step in rows:
        if not found or found[-1][0] != epoch:
            found.append((epoch, step))
    return found
