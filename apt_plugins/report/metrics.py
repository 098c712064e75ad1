"""``metrics.jsonl`` as one series a key, read as a stream: it may have a million rows."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apt_core.files import read_lines
from apt_core.metric_names import CROSS_ENTROPY

Array = NDArray[np.float64]

NOT_FINITE = ("nan", "inf", "-inf")
"""How the trainer writes what JSON has no number for."""

LARGEST = 1e30
"""What is beyond it no axis can show; it counts as not finite."""


SMALLEST = 1e-100
"""What is nearer to 0 no axis can show; it is drawn as 0."""

MAX_STEP = 10**15

MAX_LINE = 10_000_000
"""Bytes of a row; a longer one is left out."""


@dataclass(frozen=True)
class Series:
    """Values ``raw`` [N] of one key at ascending steps ``x`` [N], one a step."""

    name: str
    x: Array
    raw: Array

    @cached_property
    def y(self) -> Array:
        """What is drawn: NaN where a value is not finite or too large, 0 near to it."""
        size = np.abs(self.raw)
        drawn = np.where(size < SMALLEST, 0.0, self.raw) if (size < SMALLEST).any() else self.raw
        drawable = size <= LARGEST
        return drawn if drawable.all() else np.where(drawable, drawn, np.nan)

    def where(self, kept: NDArray[np.bool_]) -> Series:
        return Series(self.name, self.x[kept], self.raw[kept])

    @property
    def finite(self) -> Series:
        return self.where(np.isfinite(self.y))


@dataclass
class Metrics:
    """Every numeric key of the ``rows``, which are counted, ``samples`` by step, and the step that
    begins each epoch."""

    series: dict[str, Series] = field(default_factory=dict)
    samples: list[tuple[int, str]] = field(default_factory=list)
    epochs: list[tuple[int, int]] = field(default_factory=list)
    last_step: int = 0
    rows: int = 0
    notes: list[str] = field(default_factory=list)


def read_metrics(path: Path) -> Metrics:
    """Read all rows that are whole; the notes say how many are not."""
    metrics = Metrics()
    columns: dict[str, tuple[array[float], array[float]]] = {}
    unread, cut_off, epoch = 0, False, 0
    try:
        for raw in read_lines(path, MAX_LINE):
            line = raw.decode("utf-8", errors="replace")
            row = _row(line)
            if row is None:
                cut_off = not line.endswith("\n")
                unread += not cut_off
                continue
            step = row["step"]
            metrics.rows += 1
            metrics.last_step = max(metrics.last_step, step)
            if type(row.get("epoch")) is int and row["epoch"] != epoch:
                epoch = row["epoch"]
                metrics.epochs.append((epoch, step))
            for key, value in row.items():
                kind = type(value)
                if kind is float or kind is int or (kind is str and value in NOT_FINITE):
                    column = columns.get(key)
                    if column is None:
                        column = columns[key] = (array("d"), array("d"))
                    column[0].append(step)
                    column[1].append(value if kind is float else as_float(value))
                elif key == "sample" and kind is str:
                    metrics.samples.append((step, value))
    except FileNotFoundError:
        metrics.notes.append("there is no metrics.jsonl")
    except OSError as error:
        metrics.notes.append(f"metrics.jsonl cannot be read: {error.strerror}")
    metrics.series = {
        key: _series(key, *column)
        for key, column in columns.items()
        if key not in ("step", "epoch")
    }
    if cut_off:
        metrics.notes.append("the last row of metrics.jsonl is cut off and left out")
    if unread:
        metrics.notes.append(f"{unread:,} lines of metrics.jsonl cannot be read and are left out")
    return metrics


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row if 0 <= row["step"] < MAX_STEP else None


def as_float(value: float | str) -> float:
    """A number of a file; one that no float can hold is infinite."""
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return float("-inf" if isinstance(value, int) and value < 0 else "inf")


def _series(name: str, steps: array[float], values: array[float]) -> Series:
    x, y = np.frombuffer(steps), np.frombuffer(values)
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    # Two evaluations at one step: the later one, which is of the whole held-out text.
    kept = np.append(x[1:] != x[:-1], True)
    return Series(name, x[kept], y[kept])


def training_loss(series: Mapping[str, Series]) -> Series | None:
    """The cross-entropy of the steps; in rows that do not have it, the loss without its terms."""
    entropy, loss = series.get(CROSS_ENTROPY), series.get("loss")
    if loss is None or (entropy is not None and entropy.x.size == loss.x.size):
        return entropy if entropy is not None else loss
    rest = loss.raw.copy()
    for name, term in series.items():
        if name.startswith("loss/"):
            _, at, of = np.intersect1d(loss.x, term.x, return_indices=True)
            rest[at] -= term.raw[of]
    if entropy is not None:
        _, at, of = np.intersect1d(loss.x, entropy.x, return_indices=True)
        rest[at] = entropy.raw[of]
    return Series("loss", loss.x, rest)
