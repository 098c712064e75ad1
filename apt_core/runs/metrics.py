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
"""How a run writes numbers that JSON does not have."""


@dataclass(frozen=True)
class Series:
    """Values [N] of the key ``name`` at ascending ``steps`` [N], one a step; float64."""

    name: str
    steps: NDArray[np.float64]
    values: NDArray[np.float64]


@dataclass
class Metrics:
    """Every numeric key of the ``rows``, which are counted, ``samples`` by step, each of ``epochs``
    with the step that begins it; ``notes`` say what could not be read."""

    series: dict[str, Series] = field(default_factory=dict)
    samples: list[tuple[int, str]] = field(default_factory=list)
    epochs: list[tuple[int, int]] = field(default_factory=list)
    last_step: int = 0
    rows: int = 0
    notes: list[str] = field(default_factory=list)


def read_metrics(folder: Path) -> Metrics:
    """Read the metrics of the run in ``folder``, whatever state its file is in; never raises.

    Where the steps of training go back, a resume has begun: of what comes before it, rows of steps
    that were taken again do not count. Of two values at a step the later one does.
    """
    metrics = Metrics()
    columns: dict[str, tuple[array[int], array[float]]] = {}
    samples: list[tuple[int, str]] = []
    steps, epochs, trained = array("q"), array("q"), array("b")
    for number, row in enumerate(read_rows(folder / METRICS, metrics.notes)):
        steps.append(row["step"])
        epochs.append(row["epoch"] if is_step(row.get("epoch")) else -1)
        trained.append("loss" in row)
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
    at = np.frombuffer(steps, dtype=np.int64)
    counted = _counted(at, np.flatnonzero(np.frombuffer(trained, dtype=np.bool_)))
    metrics.rows = int(counted.sum())
    metrics.last_step = int(at[counted].max(initial=0))
    metrics.samples = [(steps[i], text) for i, text in samples if counted[i]]
    metrics.epochs = _first_of_each(
        (epochs[i], steps[i]) for i in np.flatnonzero(counted) if epochs[i] >= 0
    )
    for key, (numbers, values) in columns.items():
        if key not in ("step", "epoch"):
            rows = np.frombuffer(numbers, dtype=np.int64)
            kept = counted[rows]
            if kept.any():
                x, y = at[rows[kept]].astype(np.float64), np.frombuffer(values)[kept]
                metrics.series[key] = _series(key, x, y)
    return metrics


def as_float(value: float | str) -> float:
    """A number of a file; one that no float can hold is infinite."""
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return float("-inf" if isinstance(value, int) and value < 0 else "inf")


def _counted(steps: NDArray[np.int64], training: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows, of ``steps``, are of the run as it went on: those whose step none of the later
    rows of ``training`` (their numbers) goes back to, or behind."""
    back = training[1:][steps[training[1:]] <= steps[training[:-1]]]
    taken_again = np.full(steps.size + 1, MAX_STEP)
    taken_again[back] = steps[back]
    later: NDArray[np.int64] = np.minimum.accumulate(taken_again[::-1])[::-1][1:]
    return steps < later


def _series(name: str, steps: NDArray[np.float64], values: NDArray[np.float64]) -> Series:
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last = np.append(steps[1:] != steps[:-1], True)
    return Series(name, steps[last], values[last])


def _first_of_each(rows: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Epochs with their first steps, of rows by (epoch, step)."""
    found: list[tuple[int, int]] = []
    for epoch, step in rows:
        if not found or found[-1][0] != epoch:
            found.append((epoch, step))
    return found
