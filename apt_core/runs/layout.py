"""Finds the checkpoints of a run by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
PREFIX = "step-"
IS_STEP = re.compile(rf"{PREFIX}\d{{1,18}}")


def folder_name(step: int) -> str:
    """The name of the checkpoint's folder that was taken after ``step``."""
    return f"{PREFIX}{step:08d}"


def step_of(path: Path) -> int:
    """The step of the checkpoint at ``path``, whose name is a :func:`folder_name`."""
    return int(path.name.removeprefix(PREFIX))


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders below ``root``, oldest first; unfinished ones are left out."""
    found = [path for path in root.glob(f"{PREFIX}*") if IS_STEP.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def checkpoints_folder(
    run: Path, manifest: Mapping[str, Any], checkpoint_dir: str | None
) -> Path | None:
    """Where the checkpoints of the run in the folder ``run`` are: inside it, or else where its
    ``manifest`` says, directly below the profile's ``checkpoint_dir``. None for any other place: a
    manifest does not decide what is read and written."""
    inside = run / CHECKPOINTS
    if inside.is_dir():
        return inside
    said = named_folder(run, manifest)
    run = Path(os.path.realpath(run))
    if said.is_relative_to(run) and said != run:
        return said
    if checkpoint_dir is not None and said.parent == Path(os.path.realpath(checkpoint_dir)):
        return said
    return None


def named_folder(run: Path, manifest: Mapping[str, Any]) -> Path:
    """The folder of checkpoints that the ``manifest`` of a run names."""
    named = manifest.get("checkpoint_dir")
    if not isinstance(named, str) or "\0" in named:
        named = CHECKPOINTS
    return Path(os.path.realpath(run / named))
