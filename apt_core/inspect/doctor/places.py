"""The folders that APT writes to: whether it can, and how much room they have."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from apt_core.cache import cache_dir
from apt_core.inspect.doctor.checks import BROKEN, NOTE, OK, Check, in_gib
from apt_core.profile_paths import RUNS

LITTLE_ROOM = 2**30


def folders() -> Iterator[Check]:
    """Folders for runs, the cache, temporary files, and the home directory."""
    try:
        here = os.getcwd()
    except FileNotFoundError:
        yield Check("runs", BROKEN, "the working directory has been removed", "cd to another")
    else:
        yield _examined(
            "runs",
            Path(here) / RUNS,
            BROKEN,
            "no run can be made here",
            "cd to another folder, or apt-train --output FOLDER",
        )
    lost = "token stores and tokenizers are made anew by every run"
    try:
        yield _examined("cache", cache_dir(), NOTE, lost, "APT_CACHE=FOLDER")
    except OSError as error:
        yield Check("cache", NOTE, f"{error}: {lost}", "APT_CACHE=FOLDER")
    try:
        temporary = tempfile.gettempdir()
    except OSError as error:
        reason = error.strerror or str(error)
        yield Check(
            "temporary files", BROKEN, f"no folder can be written: {reason}", "TMPDIR=FOLDER"
        )
    else:
        yield _examined("temporary files", Path(temporary), BROKEN, "", "TMPDIR=FOLDER")
    home = os.path.expanduser("~")
    if home.startswith("~"):
        yield Check("home", NOTE, "no home directory is known", "HOME=FOLDER")
    else:
        lost = "only the installation of shell completion needs it, beside a cache in it"
        yield _examined("home", Path(home), NOTE, lost, "")


def _examined(name: str, folder: Path, state: str, lost: str, remedy: str) -> Check:
    """The check of a folder, or of the nearest one around it that is there. ``state`` is that of
    one which cannot be written, ``lost`` what does not work then."""
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        room = shutil.disk_usage(there).free
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        detail = f"{folder} cannot be written: {reason}" + (f"; {lost}" if lost else "")
        return Check(name, state, detail, remedy)
    detail = f"{folder}, {in_gib(room)} free"
    if room < LITTLE_ROOM and name != "home":
        return Check(name, NOTE, f"{detail}: little room", remedy or "make room")
    return Check(name, OK, detail)
