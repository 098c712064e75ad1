"""What ``scores.json`` keeps of a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from apt_core.config import Override
from apt_core.evaluation.likelihood import default_stride
from apt_core.evaluation.metrics import Figure
from apt_core.evaluation.scoring import Scoring, TaskScore
from apt_core.runs.folder import now, versions
from apt_core.runs.session import Session


def score_row(
    score: TaskScore,
    session: Session,
    scoring: Scoring,
    weights: str,
    overrides: Sequence[Override],
) -> dict[str, Any]:
    """The row of ``score`` in the form of :class:`~apt_core.runs.task_scores.ScoreRow`."""
    items, found, context = score.items, score.found, session.config.model.max_seq_len
    return {
        "task": items.name,
        "metrics": {name: asdict(figure) for name, figure in score.figures.items()},
        **of_session(session, weights, overrides),
        "task_sha256": items.sha256,
        "asked": items.task.asked(),
        "items": len(items.chosen),
        "total": items.total,
        "units": found.units,
        "too_long": found.too_long,
        "precision": found.precision,
        "batch_size": scoring.batch_size,
        "context": context,
        "stride": scoring.stride or default_stride(context),
        "seconds": round(score.seconds, 3),
    }


def of_session(session: Session, weights: str, overrides: Sequence[Override]) -> dict[str, Any]:
    """What every row has: which ``weights`` were scored, when, and by what. ``overrides`` are those
    with which the session was opened."""
    return {
        "time": now(),
        "checkpoint": session.checkpoint.name if session.checkpoint is not None else "",
        "step": session.position.step,
        "weights": weights,
        "device": str(session.device),
        "plugins": sorted(name for name, _ in session.manager.list_name_plugin()),
        "settings": session.config.plugin_settings(),
        "overrides": session.config.values(each.path for each in overrides),
        "versions": versions(),
    }


def shown(figure: Figure, *, signed: bool = False) -> str:
    """A figure with its interval, for a table.

    >>> shown(Figure(0.5, 0.25, 0.75, "wilson")), shown(Figure(-0.012), signed=True)
    ('0.500 [0.250, 0.750]', '-0.0120')
    """
    value = _digits(figure.value, signed=signed)
    if figure.low is None or figure.high is None:
        return value
    low, high = (_digits(each, signed=signed) for each in (figure.low, figure.high))
    return f"{value} [{low}, {high}]"


def _digits(value: float, *, signed: bool) -> str:
    sign = "+" if signed else ""
    size = abs(value)
    if size and size < 0.1:
        return f"{value:{sign}.3g}" if size < 1e-4 else f"{value:{sign}.4f}"
    return f"{value:{sign}.3f}" if size < 1000 else f"{value:{sign},.0f}"
