"""``scores.json`` in the folder of a run: what its checkpoints scored on tasks, and under which
conditions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apt_core.data.store.lock import waiting_for
from apt_core.errors import CheckpointError
from apt_core.files import write_atomically
from apt_core.json_files import read_json, without_nan

SCORES = "scores.json"

VERSION = 1
"""Of the form of the file; one of a later version is neither read nor written."""


class _Row(BaseModel):
    """Takes later fields along, and numbers that JSON has no words for as texts."""

    model_config = ConfigDict(extra="allow", frozen=True)


class FigureRow(_Row):
    """A score. ``low`` and ``high`` bound its interval of 95 %, made by ``method`` over ``units``
    items, documents or windows; None where there are too few."""

    value: float
    low: float | None = None
    high: float | None = None
    method: str = ""


class ScoreRow(_Row):
    """The ``metrics`` of a ``task`` and all that they depend on.

    The model: the ``checkpoint`` of ``step`` with the ``weights`` last, best or average, the
    ``plugins`` that took part, their ``settings`` by section, and which keys ``overrides`` set in
    place of what the run has; secrets are masked. The task: ``task_sha256`` of all its items and of
    how they are asked (``asked``), of which ``items`` of ``total`` were looked at, ``too_long`` of
    them without their beginning. How it was computed: ``precision``, ``device``, ``batch_size``,
    ``context``, ``stride``, ``versions``.
    """

    task: str
    metrics: dict[str, FigureRow]
    time: str = ""
    checkpoint: str = ""
    step: int = 0
    weights: str = "last"
    plugins: list[str] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)
    overrides: dict[str, Any] = Field(default_factory=dict)
    task_sha256: str = ""
    asked: dict[str, Any] = Field(default_factory=dict)
    items: int = 0
    total: int = 0
    units: str = "items"
    too_long: int = 0
    precision: str = ""
    device: str = ""
    batch_size: int = 0
    context: int = 0
    stride: int | None = None
    seconds: float = 0.0
    versions: dict[str, str] = Field(default_factory=dict)


def read_scores(folder: Path) -> list[ScoreRow]:
    """The scores of the run in ``folder``, oldest first; none where it has no file.

    Raises CheckpointError for a file that is damaged or of a later version.
    """
    path = folder / SCORES
    try:
        data = read_json(path)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    version = data.get("version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"{path}: is of version {version}, written by a later APT: this one knows {VERSION}"
        )
    rows = data.get("scores") if isinstance(data, dict) else None
    if version != VERSION or not isinstance(rows, list):
        raise CheckpointError(f"{path}: has no scores; move it away to begin a new one")
    try:
        return [ScoreRow.model_validate(row) for row in rows]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {place}: {first['msg']}") from None


def add_scores(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add ``rows``, in the form of :class:`ScoreRow`, to the scores of the run in ``folder``, which
    are kept; other processes may add theirs at the same time.

    Raises CheckpointError for a file that :func:`read_scores` refuses, which is left as it is, and
    OSError where it cannot be written.
    """
    for row in rows:
        ScoreRow.model_validate(row)
    with _locked(folder):
        kept = [row.model_dump() for row in read_scores(folder)]
        data = without_nan({"version": VERSION, "scores": [*kept, *rows]})
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / SCORES, text + "\n")


def _locked(folder: Path) -> Any:
    lock = folder / f".{SCORES}.lock"
    return waiting_for(lock, SCORES) if folder.is_dir() else nullcontext()
