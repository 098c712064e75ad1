"""Compares two runs bit by bit: what is equal, what differs, and from which step on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apt_core.errors import CheckpointError
from apt_core.runs import checkpoint
from apt_core.runs.checkpoint import Checkpoint
from apt_core.runs.display import html_rows
from apt_core.runs.layout import CHECKPOINTS, folder_name, list_checkpoints
from apt_core.runs.metrics import METRICS
from apt_core.runs.rows import read_rows

VOLATILE = ("tokens_per_s", "mfu", "memory_mb", "time/")
"""Prefixes of the names of figures that depend on the machine, not on the training."""

TIME = "spent"
"""The part of a checkpoint's state that depends on the machine."""

OWN = ("loss/", "schedule/", "task/")
"""Beginnings of the names of metrics with a slash that are of the training; others are of plugins,
and need not be functions of it."""


MAX_SHOWN = 50
"""Differences that a comparison shows of itself."""


@dataclass(frozen=True)
class Difference:
    """``what`` differs after ``step``: a tensor, a part of the state, or a metric; ``detail`` says
    what it is in each of the two, ``foreign`` whether it is a metric of a plugin."""

    step: int
    what: str
    detail: str = ""
    foreign: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}" if self.detail else self.what


@dataclass
class Comparison:
    """What was ``compared``, and every difference, the earliest step first."""

    compared: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([self._title(), *map(str, self.differences[:MAX_SHOWN])])

    def _repr_html_(self) -> str:
        rows = [(each.step, each.what, each.detail) for each in self.differences[:MAX_SHOWN]]
        return html_rows(self._title(), ("step", "what", "difference"), rows)

    def _title(self) -> str:
        count = len(self.differences)
        found = f"{count:,} differences" if count else "equal, bit for bit"
        return f"{found}: {'; '.join(self.compared) or 'nothing was compared'}"


def compare_runs(
    one: Path,
    other: Path,
    *,
    step: int | None = None,
    after: int = -1,
    names: tuple[str, str] = ("in the first", "in the second"),
) -> Comparison:
    """Compare two runs by their folders: the checkpoints of ``step``, or the last ones, and the
    metrics of the steps after ``after`` up to there. In differences they are called by ``names``.

    Figures of the machine are left out. Raises CheckpointError where one has no such checkpoint, or
    a damaged one.
    """
    first, second = (_checkpoint(folder, step) for folder in (one, other))
    found = compare_checkpoints(first, second, names=names)
    rows, differences = _compare_rows(one, other, after, step, names)
    found.compared.append(f"{rows} rows of metrics" + (f" after step {after}" * (after >= 0)))
    found.differences = sorted(
        [*found.differences, *differences], key=lambda each: (each.step, each.what)
    )
    return found


def _checkpoint(run: Path, step: int | None) -> Checkpoint:
    root = run / CHECKPOINTS
    if step is not None:
        return checkpoint.load(root / folder_name(step))
    found = list_checkpoints(root)
    if not found:
        raise CheckpointError(f"{root}: there is no checkpoint in it")
    return checkpoint.load(found[-1])


def compare_checkpoints(
    one: Checkpoint,
    other: Checkpoint,
    *,
    names: tuple[str, str] = ("in the first", "in the second"),
) -> Comparison:
    """Compare all tensors of two checkpoints by their bytes, and all of their state but what is of
    the machine."""
    found = Comparison()
    step = max(one.state.step, other.state.step)
    averages = max(len(each.state.averages) for each in (one, other))
    kinds = ["model", "optimizer", "ema", *(f"average-{n}" for n in range(averages)), "plugins"]
    for kind in kinds:
        pair = [_tensors(kind, each) for each in (one, other)]
        if not any(pair):
            continue
        found.compared.append(f"{len(pair[0])} tensors of {kind}")
        for name in pair[0].keys() | pair[1].keys():
            if detail := _tensor_difference(pair[0].get(name), pair[1].get(name), names):
                found.differences.append(Difference(step, f"{kind}: {name}", detail))
    states = [each.state.to_json() for each in (one, other)]
    for part in states[0].keys() - {TIME}:
        was, now = (state[part] for state in states)
        if part in ("plugins", "metrics"):
            what = "the state of plugin {}" if part == "plugins" else "the state: metrics: {}"
            differing = _differing(was or {}, now or {}, names)
        else:
            what, differing = "the state: {}", _differing({part: was}, {part: now}, names)
        for name, detail in differing:
            foreign = part == "metrics" and _is_foreign(name)
            found.differences.append(Difference(step, what.format(name), detail, foreign))
    found.compared.append("the rest of the state")
    found.differences.sort(key=lambda each: each.what)
    return found


def _tensors(kind: str, found: Checkpoint) -> Mapping[str, Tensor]:
    if kind == "plugins":
        return found.plugins
    if not ((found.path / f"{kind}.safetensors").exists() or (found.path / kind).is_dir()):
        return {}
    saved = found.tensors(kind)
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in saved.shapes.items()}
    saved.read_into(tensors, "tensors")
    return tensors


def _tensor_difference(one: Tensor | None, other: Tensor | None, names: tuple[str, str]) -> str:
    """Where the bytes of two tensors begin to differ, as a text; empty if they are equal. Equal
    NaNs are equal, and 0.0 differs from -0.0."""
    if one is None or other is None:
        return f"only {names[one is None]}"
    said = [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (one, other)]
    if said[0] != said[1]:
        return _pair_text(said, names)
    rows = [t.reshape(-1, 1).view(torch.uint8) for t in (one, other)]
    if torch.equal(*rows):
        return ""
    places = (rows[0] != rows[1]).any(dim=1).nonzero().flatten()
    first = int(places[0])
    index = [int(i) for i in np.unravel_index(first, one.shape)]
    values = [t.reshape(-1)[first].item() for t in (one, other)]
    return (
        f"{places.numel():,} of {one.numel():,} values, the first at {index}: "
        f"{_pair_text(values, names)}"
    )


def _differing(
    one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str]
) -> Iterator[tuple[str, str]]:
    """Names and texts of the values that differ, except those that depend on the machine."""
    for name in sorted(one.keys() | other.keys()):
        # Compared as JSON, where a NaN equals itself.
        was, now = (json.dumps(each.get(name), sort_keys=True) for each in (one, other))
        if was != now and not name.startswith(VOLATILE):
            yield name, _pair_text((was, now), names)


def _pair_text(pair: Sequence[object], names: tuple[str, str]) -> str:
    return f"{pair[0]!s:.300} {names[0]}, {pair[1]!s:.300} {names[1]}"


def _is_foreign(metric: str) -> bool:
    return "/" in metric and not metric.startswith(OWN)


Key = tuple[int, str, int]


def _compare_rows(
    one: Path, other: Path, after: int, step: int | None, names: tuple[str, str]
) -> tuple[int, list[Difference]]:
    (first, unread), (second, also) = (_rows(folder, after, step) for folder in (one, other))
    differences = []
    if unread != also:
        differences.append(
            Difference(0, METRICS, _pair_text(("; ".join(unread), "; ".join(also)), names))
        )
    for key in first.keys() | second.keys():
        at, kind, _ = key
        if key not in first or key not in second:
            only = f"only {names[key not in first]}"
            differences.append(Difference(at, f"the row of {kind} after step {at}", only))
            continue
        for name, detail in _differing(first[key], second[key], names):
            what = f"{name} after step {at}"
            differences.append(Difference(at, what, detail, _is_foreign(name)))
    return len(first), differences


def _rows(
    folder: Path, after: int, until: int | None
) -> tuple[dict[Key, dict[str, Any]], list[str]]:
    """The rows of a run by step, by whether they are of training or of an evaluation, and numbered
    where there are several; and what could not be read of its file."""
    notes: list[str] = []
    rows: dict[Key, dict[str, Any]] = {}
    for row in read_rows(folder / METRICS, notes):
        if after < row["step"] and (until is None or row["step"] <= until):
            kind = "training" if "loss" in row else "evaluation"
            number = next(n for n in count() if (row["step"], kind, n) not in rows)
            rows[row["step"], kind, number] = row
    return rows, notes
