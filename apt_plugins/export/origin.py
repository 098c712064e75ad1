"""What of which run is exported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apt_core import ConfigError
from apt_core.json_files import read_json
from apt_core.runs import Session
from apt_core.runs.finding import run_of
from apt_plugins.export.certificate import Origin


def folder_of(session: Session) -> Path:
    """The folder of the run that was opened as ``session``."""
    assert session.checkpoint is not None
    return run_of(session.checkpoint)


def manifest_of(session: Session) -> dict[str, Any]:
    """The manifest of the run; empty where it cannot be read."""
    try:
        found = read_json(folder_of(session) / "manifest.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_finished(session: Session) -> None:
    """Raise ConfigError for a run that has not ended, or ended by a failure or a signal."""
    status = manifest_of(session).get("status", "finished")
    if status in ("finished", "stopped"):
        return
    step = session.position.step
    raise ConfigError(
        f"the run is unfinished: {status}, with a checkpoint of step {step}",
        "RUN",
        str(folder_of(session)),
        f"--step {step} exports what it was then; apt-train --resume goes on with it",
    )


def origin_of(session: Session, output: Path, weights: str, plugins: Sequence[str]) -> Origin:
    """What the certificate in ``output`` says of the run, whose place it has relative to that: an
    export that goes elsewhere does not tell where it was made."""
    assert session.checkpoint is not None
    return Origin(
        run=os.path.relpath(folder_of(session).resolve(), output.resolve()),
        checkpoint=session.checkpoint.name,
        profile=session.config.name,
        step=session.position.step,
        weights=weights,
        plugins=list(plugins),
    )
