"""Hashes of the contents of files, kept so that a file is hashed once."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from apt_core.cache import cache_dir
from apt_core.data.sources.files import DataFile
from apt_core.data.sources.reading import BLOCK, Reading
from apt_core.files import write_atomically
from apt_core.json_files import read_json
from apt_core.log import get_logger

log = get_logger("apt.data")

SETTLED = 2.0
"""Seconds after which a file's time tells a change: clocks of file systems have ticks, within which
a second write leaves size and time as they are."""


def kept_sha256(files: Sequence[DataFile], key: str) -> list[str]:
    """The sha256 of the bytes of each file, compressed as they are.

    One that was hashed before is not read again while its identity is the same, and, of a local
    file, the time of its last change, which no program can set. Where the cache
    cannot be written, the log says so. Raises ConfigError, with the profile's ``key``, for what
    cannot be read.
    """
    name = _name(files)
    known, began = _read(name), time.time()
    hashes: list[str] = []
    kept: dict[str, list[Any]] = {}
    for file in files:
        path, identity = _path(file), _marks(file)
        digest = _known(known, path, identity) or _sha256(file, key)
        hashes.append(digest)
        if identity is not None and _is_settled(identity, file, began):
            kept[path] = [identity, digest]
    if kept != known:
        _write(name, kept)
    return hashes


def bytes_to_hash(files: Sequence[DataFile]) -> int:
    """The size of those files whose hash :func:`kept_sha256` does not know yet; a file whose size
    its server does not tell counts as the largest there is."""
    known = _read(_name(files))
    sizes = [file.size for file in files if not _known(known, _path(file), _marks(file))]
    return sum(sys.maxsize if size is None else size for size in sizes)


def _path(file: DataFile) -> str:
    return file.where if file.filesystem else file.path


def _name(files: Sequence[DataFile]) -> str:
    return hashlib.sha256(json.dumps([_path(file) for file in files]).encode()).hexdigest()


def _known(
    known: Mapping[str, list[Any]], path: str, identity: list[int | str] | None
) -> str | None:
    entry = known.get(path)
    return entry[1] if entry is not None and identity is not None and entry[0] == identity else None


def _sha256(file: DataFile, key: str) -> str:
    digest = hashlib.sha256()
    with Reading(file, key).open(decompress=False) as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _marks(file: DataFile) -> list[int | str] | None:
    """What tells that a file is the one that was hashed, or None where nothing does."""
    if file.identity is None:
        return None
    if file.filesystem is not None:
        return list(file.identity)
    try:
        return [*file.identity, os.stat(file.path).st_ctime_ns]
    except OSError:
        return None  # which reading it will say


def _is_settled(marks: list[int | str], file: DataFile, now: float) -> bool:
    if file.filesystem is not None:
        return True
    return now - max(int(marks[1]), int(marks[-1])) / 1e9 > SETTLED


def _folder() -> Path:
    return cache_dir() / "digests"


def _read(name: str) -> dict[str, list[Any]]:
    with suppress(OSError, ValueError):
        found = read_json(_folder() / f"{name}.json")
        if isinstance(found, dict) and all(
            isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
            for entry in found.values()
        ):
            return found
    return {}


def _write(name: str, kept: dict[str, list[Any]]) -> None:
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        write_atomically(_folder() / f"{name}.json", json.dumps(kept))
    except OSError as error:
        log.warning("hashes of files are not kept: %s", error)
