"""What evaluations of checkpoints gave: ``evaluation.json`` in the folder of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from apt_core.errors import CheckpointError
from apt_core.files import write_atomically
from apt_core.json_files import read_json, without_nan
from apt_core.runs.layout import list_checkpoints

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation of a checkpoint's weights gave.

    ``loss`` is that on the watched windows. ``watched`` names these, and the figure by which a
    checkpoint is the best, where that is another than the loss: evaluations compare where it is the
    same. ``scores`` are those on the whole held-out text, empty where only a part was looked at.
    The best checkpoint has the least ``badness``: what was ``judged``, else the loss.
    """

    watched: str
    loss: float
    scores: dict[str, float] = field(default_factory=dict)
    judged: float | None = None

    @property
    def badness(self) -> float:
        return self.loss if self.judged is None else self.judged


def write_evaluation(path: Path, evaluated: Evaluated) -> None:
    """Put what an evaluation gave into the checkpoint at ``path``. Raises OSError."""
    record = without_nan(asdict(evaluated))
    if evaluated.judged is None:
        del record["judged"]
    text = json.dumps({**record, "sha256": digest(record)}, indent=1)
    write_atomically(path / EVALUATION, text)


def read_evaluation(path: Path) -> Evaluated | None:
    """What an evaluation of the checkpoint at ``path`` gave, or None without one.

    Raises CheckpointError for a damaged file.
    """
    if not (path / EVALUATION).exists():
        return None
    record = read_mapping(path / EVALUATION)
    if record.pop("sha256", None) != digest(record):
        raise CheckpointError(f"{path / EVALUATION}: the file is damaged (its own sha256)")
    try:
        scores = {name: _number(value) for name, value in record["scores"].items()}
        judged = record.get("judged")
        return Evaluated(
            str(record["watched"]),
            _number(record["loss"]),
            scores,
            None if judged is None else _number(judged),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise CheckpointError(f"{path / EVALUATION}: not what an evaluation gave") from None


def _number(value: Any) -> float:
    """A score of a file, in which one that is not finite is a text; a count stays whole. Raises
    TypeError, ValueError, OverflowError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"{value!r} is no number")
    number = float(value)
    return value if isinstance(value, int) else number


def best_by_evaluation(root: Path, watched: str = "") -> tuple[Path, float] | None:
    """The best checkpoint below ``root`` by what ``watched`` names, by default that of the newest
    evaluation; the first of equals, with its badness. None where none was evaluated by it."""
    there = evaluations(root)
    watched = watched or (there[-1][1].watched if there else "")
    found = [
        (path, evaluated.badness)
        for path, evaluated in there
        if evaluated.watched == watched and isfinite(evaluated.badness)
    ]
    return min(found, key=lambda pair: pair[1], default=None)


def evaluations(root: Path) -> list[tuple[Path, Evaluated]]:
    """The checkpoints below ``root`` that were evaluated, oldest first; damaged ones are left
    out."""
    found = []
    for path in list_checkpoints(root):
        with suppress(CheckpointError):
            evaluated = read_evaluation(path)
            found += [] if evaluated is None else [(path, evaluated)]
    return found


def digest(manifest: Mapping[str, Any]) -> str:
    """The scores in a manifest of any layout."""
    text = json.dumps(manifest, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file of a checkpoint. Raises CheckpointError for anything else."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: incomplete, it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a mapping")
    return value
