"""Arrays that are computed once and kept on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

from apt_core.files import open_file
from apt_core.log import get_logger

log = get_logger("apt.cache")

DIGEST_BYTES = 32


def cache_dir() -> Path:
    """The folder for cached results: ``APT_CACHE``, else ``apt`` in the XDG cache.

    Raises OSError where that is in a home directory and none is known.
    """
    chosen = os.environ.get("APT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = os.path.expanduser(chosen or os.path.join(base, "apt"))
    if path.startswith("~"):
        raise OSError(f"no home directory is known for {path}; APT_CACHE names another place")
    return Path(path)


def cached_array(key: str, make: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The array that ``make()`` returns, read-only and memory-mapped from the second call on.

    ``key`` must name everything that the array depends on. An entry is a .npy file with its sha256
    after it; it is written under a temporary name, flushed and renamed, so that a reader sees a
    whole entry or none. An entry that does not match its hash is made anew. Where the cache cannot
    be written, the array is returned all the same, with a warning in the log. Never pickles: an
    array of objects is a ValueError.
    """
    try:
        folder = cache_dir() / "arrays"
    except OSError as error:
        log.warning("an array is not kept: %s", error)
        return make()
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.npy"
    stored = _read(path)
    if stored is not None:
        return stored
    array = make()
    try:
        _write(path, array)
    except OSError as error:
        log.warning("cannot keep an array in the cache %s: %s", folder, error)
        return array
    stored = _read(path)
    return array if stored is None else stored


def _read(path: Path) -> npt.NDArray[Any] | None:
    import numpy as np

    try:
        size = path.stat().st_size
        with open_file(path) as file:
            digest = _digest_of(file, size - DIGEST_BYTES)
            intact = size > DIGEST_BYTES and digest == file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("cannot read the cache entry %s: %s", path, error)
        return None
    if intact:
        with suppress(OSError, ValueError):  # sealed, and no array
            array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
            return array
    log.warning("the cache entry %s is damaged and is made anew", path)
    return None


def _write(path: Path, array: npt.NDArray[Any]) -> None:
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w+b") as file:
            np.save(file, array, allow_pickle=False)
            size = file.tell()
            file.seek(0)
            digest = _digest_of(file, size)
            file.seek(size)
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _digest_of(file: Any, size: int) -> bytes:
    """The sha256 of the next ``size`` bytes of ``file``."""
    digest, left = hashlib.sha256(), size
    while left > 0:
        chunk = file.read(min(left, 1 << 20))
        if not chunk:
            break
        digest.update(chunk)
        left -= len(chunk)
    return digest.digest()
