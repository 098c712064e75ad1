"""What comes out of a study: a table, and the profile of the best trial."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_core.config import Override, Source
from apt_core.config.yaml_text import yaml_of
from apt_core.files import write_atomically
from apt_core.profile_paths import INSTALLED_FOLDER
from apt_core.secrets import is_secret
from apt_plugins.optuna.progress import value_text, values_text
from apt_plugins.optuna.records import TrialRow, best_of
from apt_plugins.optuna.settings import Settings

BEST = "best.yaml"
STATES = ("complete", "pruned", "failed", "running", "paused")


def table(rows: Sequence[TrialRow], settings: Settings) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of all trials: those that came to the end first, the best of them first."""
    sign = -1.0 if settings.maximize else 1.0
    order = {"complete": 0, "running": 1, "paused": 2, "pruned": 2, "failed": 3}

    def key(row: TrialRow) -> tuple[int, int, float, int]:
        further = 0 if row.state == "complete" else -row.step
        return order[row.state], further, sign * (row.value or 0.0), row.number

    shown = [
        [
            f"{row.number}{' (the profile)' if row.baseline else ''}",
            row.state,
            f"{row.step:,}" + (f"/{row.total_steps:,}" if row.total_steps else ""),
            "" if row.value is None else f"{row.value:.5g}",
            row.reason if row.state == "failed" else values_text(row, limit=50),
        ]
        for row in sorted(rows, key=key)
    ]
    return ["trial", "state", "step", settings.metric, "values"], shown


def summary(folder: Path, rows: Sequence[TrialRow], settings: Settings) -> dict[str, Any]:
    """The study as JSON values."""
    best = best_of(rows, maximize=settings.maximize)
    counts = {state: sum(row.state == state for row in rows) for state in STATES}
    return {
        "study": str(folder),
        **settings.row(),
        "trials": [row.row() for row in rows],
        "counts": counts,
        "best": best.row() if best else None,
        "best_profile": str(folder / BEST) if best else None,
    }


def counted(rows: Sequence[TrialRow]) -> str:
    """How many trials there are in each state, in words."""
    counts = [(sum(row.state == state for row in rows), state) for state in STATES]
    return ", ".join(f"{count} {state}" for count, state in counts if count)


def write_best(
    folder: Path,
    best: TrialRow,
    *,
    profile: str,
    source: Source,
    overrides: Sequence[Override],
    plugins: Sequence[str],
    config: Mapping[str, Any],
    metric: str,
) -> Path:
    """Write the profile of the best trial into the study's folder.

    It extends the profile that was tuned, with the ``overrides`` of the command line and of the
    trial; ``plugins`` are those that are active, where the command line chose them, and ``config``
    is the trial's profile. Raises OSError.
    """
    data: dict[str, Any] = {
        "extends": _reference(profile, source, folder),
        "name": f"{config['name']}-tuned",
    }
    if plugins:
        data["plugins"] = [*plugins]
    for override in overrides:
        section: dict[str, Any] = data
        *around, last = override.path
        for key in around:
            inner = section.setdefault(key, {})
            if not isinstance(inner, dict):
                inner = section[key] = {}
            section = inner
        if not is_secret(last, override.value):
            # Text is written as the run has it: 1e3 may be a name, and a path is resolved.
            used = _at(config, override.path)
            section[last] = used if isinstance(used, str) else override.value
    text = yaml_of(data)
    path = folder / BEST
    write_atomically(
        path,
        f"# Trial {best.number} of study {folder.absolute().name}: {metric} "
        f"{value_text(best.value)} after step {best.step}.\n{text}",
    )
    return path


def _reference(profile: str, source: Source, folder: Path) -> str:
    """How a profile in the study's folder names the one that was tuned."""
    if not source.files:
        return profile
    file = Path(source.files[-1]).absolute()
    if file.parent.resolve() == INSTALLED_FOLDER and os.sep not in profile:
        return file.stem
    try:
        return os.path.relpath(file.resolve(), folder.resolve())
    except ValueError:
        return str(file)


def _at(config: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
