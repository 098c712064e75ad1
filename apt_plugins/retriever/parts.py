"""Folders of results that are made whole or not at all, and whose bytes are checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from apt_core.files import flush, open_file, read_file
from apt_core.json_files import parse_json
from apt_core.log import get_logger

log = get_logger("apt.retriever")

CHECKSUMS = "checksums.json"
MAX_CHECKSUMS = 1 << 20


def made(folder: Path, build: Callable[[Path], None]) -> Path:
    """``folder`` with what ``build(folder)`` writes into it, if it is not there already.

    The folder appears when it is complete. One in which a file is missing, truncated or changed is
    named in the log and made anew. Raises OSError, and what ``build`` raises.
    """
    if folder.exists():
        fault = fault_of(folder)
        if fault is None:
            return folder
        log.warning("%s: %s; it is made again", folder, fault)
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        build(building)
        sums = {path.name: _sha256(path) for path in sorted(building.iterdir())}
        (building / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
        for path in building.iterdir():
            flush(path)
        try:
            os.replace(building, folder)
        except OSError:
            if fault_of(folder) is not None:  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def fault_of(folder: Path) -> str | None:
    """What is wrong with a folder that :func:`made` made; None if it is as it was."""
    try:
        sums = parse_json(read_file(folder / CHECKSUMS, MAX_CHECKSUMS).decode("utf-8"))
        if not isinstance(sums, dict) or not sums:
            return f"{CHECKSUMS} holds no checksums"
        for name, expected in sums.items():
            if os.path.basename(name) != name or name in ("", ".", ".."):
                return f"{CHECKSUMS} names a file elsewhere"
            path = folder / name
            if path.is_symlink() or _sha256(path) != expected:
                return f"{name} is damaged"
    except (OSError, ValueError, RecursionError) as error:
        return f"it is damaged ({error})"
    return None


def _sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
