"""Rows of metrics and settings as trackers take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apt_core.error_text import text_of
from apt_core.errors import AptError
from apt_core.json_files import read_json
from apt_core.runs.events import Event

MAX_TEXT = 4000
"""The most characters of a text that a tracker is given."""


def figures_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics but for its step; NaN and infinities too.

    >>> figures_of({"step": 3, "loss": 2.5, "epoch": 1, "note": "x"})
    {'loss': 2.5, 'epoch': 1}
    """
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }


def flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a profile by their dotted keys; lists as text.

    >>> dict(flat({"model": {"d_model": 8, "pattern": [1, 2]}, "name": "x"}))
    {'model.d_model': 8, 'model.pattern': '[1, 2]', 'name': 'x'}
    """
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}{key}.")
        elif value is None or isinstance(value, bool | int | float | str):
            yield f"{path}{key}", value
        else:
            yield f"{path}{key}", str(value)


def line_of(event: Event) -> str:
    """An event as a line of text."""
    return f"{event.kind}: {event.message}"[:MAX_TEXT]


def ended(folder: Path) -> dict[str, str]:
    """How the run in ``folder`` ended, by its manifest: ``status``, ``error``, ``sample``."""
    try:
        manifest = read_json(folder / "manifest.json")
    except (OSError, ValueError, AptError):
        return {}
    known = manifest if isinstance(manifest, dict) else {}
    return {
        name: text_of(known[name])[:MAX_TEXT]
        for name in ("status", "error", "reason", "sample")
        if known.get(name)
    }


def report_of(folder: Path) -> Path | None:
    """The page on the run, which is made where there is none; None where it cannot be."""
    page = folder / "report.html"
    if page.exists():
        return page
    try:
        from apt_plugins.report.page import write_report
    except ImportError:
        return None
    return write_report(folder)
