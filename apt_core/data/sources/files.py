"""Which files a source reads: paths, folders, patterns and URLs of fsspec."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from apt_core.code_source import short_path
from apt_core.error_text import one_line
from apt_core.errors import Problem
from apt_core.printable import printable
from apt_core.profile_paths import is_pattern, is_url

COMPRESSIONS = (".gz", ".zst")

INSTALL = 'pip install "apt-kernel[data]"'

_VALIDATORS = ("etag", "md5", "md5hash", "checksum", "mtime", "lastmodified", "updated", "modified")
"""What file systems call the mark that changes with the content of a file, in lower case."""


@dataclass(frozen=True)
class DataFile:
    """A file of data as it was when it was found.

    ``suffix`` is in lower case and without that of the ``compression``; ``filesystem`` is fsspec's,
    None for a local file. ``identity`` changes whenever the file does: size, time, number and
    device of a local file; size and validator (ETag, time) of another, None without a validator.
    ``named`` tells that the profile names the file itself, not a folder or pattern.
    """

    path: str
    size: int | None
    identity: tuple[int | str, ...] | None
    named: bool = True
    filesystem: Any = None

    @property
    def where(self) -> str:
        """The path for messages, relative where it lies below the working directory."""
        if self.filesystem is not None:
            return printable(str(self.filesystem.unstrip_protocol(self.path)), keep="")
        return printable(short_path(self.path), keep="")

    @property
    def suffix(self) -> str:
        return split_suffixes(self.path)[0]

    @property
    def compression(self) -> str:
        return split_suffixes(self.path)[1]

    def identity_now(self) -> tuple[int | str, ...] | None:
        """The identity as of now. Raises OSError, or what the file system raises."""
        if self.filesystem is None:
            return _identity(os.stat(self.path))
        # A listing that it keeps would say what was.
        self.filesystem.invalidate_cache()
        return _remote_identity(self.filesystem.info(self.path))


@dataclass
class Found:
    """The files that the paths of one key lead to, in the order in which they are read; how many
    ``skipped`` files have which suffix; and the ``problems`` met."""

    files: list[DataFile] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(file.size or 0 for file in self.files)


def split_suffixes(path: str) -> tuple[str, str]:
    """The suffix of a path and the one of its compression, in lower case.

    >>> split_suffixes("a/Corpus.JSONL.gz"), split_suffixes("README")
    (('.jsonl', '.gz'), ('', ''))
    """
    stem, last = os.path.splitext(os.path.basename(path).lower())
    if last in COMPRESSIONS:
        return os.path.splitext(stem)[1], last
    return last, ""


def find_files(
    paths: str | Iterable[str], suffixes: Collection[str], key: str, without: Collection[str] = ()
) -> Found:
    """The files of ``paths``, the value of ``key``: in its order, those of a folder or pattern
    sorted by path, each file once.

    Of a folder, files of the ``suffixes`` are taken at any depth, but nothing whose name begins
    with a dot, and not what is in folders named as one ``without``; links are followed, each folder
    is read once. A pattern (``*``, ``?``, ``[…]``,
    ``**`` for any depth) takes what it matches, whatever the suffix.
    """
    found, seen = Found(), set()
    for path in [paths] if isinstance(paths, str) else paths:
        count = len(found.problems)
        before = found.skipped.copy()
        files = list(_files_at(path, suffixes, key, found, without))
        if not files and len(found.problems) == count:
            found.problems.append(_nothing_at(path, key, suffixes, found.skipped - before))
        for file in files:
            # By number and device: a file may have several names.
            this = file.path if file.filesystem else (file.identity or ())[2:]
            if this not in seen:
                seen.add(this)
                found.files.append(file)
    return found


def _files_at(
    path: str, suffixes: Collection[str], key: str, found: Found, without: Collection[str]
) -> Iterator[DataFile]:
    local = re.sub(r"^(file|local)://", "", path)
    if is_url(local):
        try:
            yield from _remote_files(local, suffixes, found)
        except Exception as error:  # of any file system, of which each has errors of its own
            found.problems.append(_remote_problem(path, key, error))
        return
    try:
        if os.path.lexists(local) or not is_pattern(local):
            matches, named = [local], True
        else:
            matches, named = sorted(glob.glob(local, recursive=True)), False
        for match in matches:
            status = os.stat(match)
            if stat.S_ISDIR(status.st_mode):
                yield from _files_below(match, suffixes, key, found, without)
            elif named or stat.S_ISREG(status.st_mode):
                yield DataFile(match, status.st_size, _identity(status), named)
            else:
                found.skipped["no file"] += 1
    except (OSError, ValueError) as error:
        found.problems.append(unreadable(printable(path, keep=""), key, error))


def _files_below(
    folder: str, suffixes: Collection[str], key: str, found: Found, without: Collection[str]
) -> Iterator[DataFile]:
    def fail(error: OSError) -> None:
        found.problems.append(unreadable(printable(str(error.filename), keep=""), key, error))

    files, visited = [], set()
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in visited:  # a link leads back
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        hidden = [name for name in (*folders, *names) if name.startswith(".")]
        found.skipped["hidden"] += len(hidden)
        folders[:] = sorted(set(folders).difference(hidden, without))
        files += [os.path.join(here, name) for name in names if not name.startswith(".")]
    for path in sorted(files):
        suffix = split_suffixes(path)[0]
        if suffix not in suffixes:
            found.skipped[suffix or "no suffix"] += 1
            continue
        try:
            status = os.stat(path)
        except OSError as error:
            found.problems.append(unreadable(printable(path, keep=""), key, error))
            continue
        if stat.S_ISREG(status.st_mode):
            yield DataFile(path, status.st_size, _identity(status), named=False)
        else:
            found.skipped["no file"] += 1


def _remote_files(url: str, suffixes: Collection[str], found: Found) -> Iterator[DataFile]:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()  # of another run in this process
    if is_pattern(url):
        matches = filesystem.glob(path, detail=True)
        for name, info in sorted(matches.items()):
            if os.path.basename(name).startswith("."):
                found.skipped["hidden"] += 1
            elif info["type"] == "file":
                yield _remote_file(filesystem, name, info, named=False)
        return
    info = filesystem.info(path)
    if info["type"] != "directory":
        yield _remote_file(filesystem, path, info, named=True)
        return
    for name, info in sorted(filesystem.find(path, detail=True).items()):
        suffix = split_suffixes(name)[0]
        if any(part.startswith(".") for part in name[len(path) :].split("/")):
            found.skipped["hidden"] += 1
        elif suffix in suffixes:
            yield _remote_file(filesystem, name, info, named=False)
        else:
            found.skipped[suffix or "no suffix"] += 1


def _remote_file(filesystem: Any, path: str, info: Mapping[str, Any], named: bool) -> DataFile:
    return DataFile(path, info.get("size"), _remote_identity(info), named, filesystem)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def _remote_identity(info: Mapping[str, Any]) -> tuple[int | str, ...] | None:
    named = {re.sub(r"[^a-z0-9]", "", str(name).lower()): value for name, value in info.items()}
    marks = [str(named[name]) for name in _VALIDATORS if named.get(name)]
    return (str(named.get("size")), *marks) if marks else None


def unreadable(where: str, key: str, error: BaseException, hint: str = "") -> Problem:
    """The problem of a file that the system does not give."""
    reason = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
    return Problem(f"cannot be read: {reason}", key, where, hint)


def _remote_problem(url: str, key: str, error: Exception) -> Problem:
    where = printable(url, keep="")
    if isinstance(error, ImportError):
        if error.name == "fsspec":
            return Problem("URLs need fsspec, which is not installed", key, where, INSTALL)
        return Problem(
            f"a package that fsspec needs for this URL is not installed: {one_line(error)}",
            key,
            where,
            "install it with pip",
        )
    if isinstance(error, FileNotFoundError):
        # Of HTTP also where there is no such server, which its cause says.
        cause = "" if error.__cause__ is None else f": {one_line(error.__cause__)}"
        return Problem(f"is not found{cause}", key, where)
    return unreadable(where, key, error)


def _nothing_at(
    path: str, key: str, suffixes: Collection[str], skipped: Mapping[str, int]
) -> Problem:
    where = printable(path, keep="")
    if is_pattern(path) and not os.path.exists(path):
        return Problem("no file matches this pattern", key, where, "** stands for any depth")
    others = ", ".join(f"{number:,} × {suffix}" for suffix, number in skipped.items() if number)
    return Problem(
        f"the folder has no file to read{f', but {others}' if others else ''}",
        key,
        where,
        f"in a folder the suffix decides ({', '.join(sorted(suffixes))}, with or without .gz and "
        ".zst); a pattern such as *.log takes what it matches",
    )
