"""Reads the entry points of installed distributions; a damaged one is reported and skipped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import (
    Distribution,
    EntryPoint,
    EntryPoints,
    PackageNotFoundError,
    distribution,
    distributions,
    version,
)
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote, urlsplit

from apt_core.error_text import one_line
from apt_core.errors import Problem
from apt_core.plugin_names import normalized_name

_read_entry_points = Distribution.entry_points.fget  # type: ignore[attr-defined]

OWN = "apt-kernel"
"""The name of APT's own distribution."""

HINT = "reinstall it, or remove what is left of it"


@dataclass(frozen=True)
class Offer:
    """One entry point, with the name and version of its distribution."""

    point: EntryPoint
    dist: str
    version: str

    @property
    def value(self) -> str:
        """``module`` or ``module:attribute``."""
        return self.point.value


def offers(group: str, problems: list[Problem]) -> Iterator[Offer]:
    """Every entry point of ``group``; adds distributions that cannot be read to ``problems``."""
    seen = set()
    for dist in distributions():
        folder = str(getattr(dist, "_path", dist))
        name = normalized_name(PurePath(folder).stem.partition("-")[0])
        if name in seen:  # the first distribution of a name on the import path counts
            continue
        try:
            text = dist.read_text("entry_points.txt")
            if text is None:
                _raise_unless_missing(folder)
            seen.add(name)
            ours = f"[{group}]" in (text or "")
            points = _read_entry_points(dist).select(group=group) if ours else ()
        except Exception as error:
            problems.append(
                Problem(f"its entry points cannot be read: {one_line(error)}", folder, hint=HINT)
            )
            _hide_unreadable_entry_points()
            continue
        if points:
            shown, version = _name_and_version(dist, folder, problems)
            for point in points:
                yield Offer(point, shown, version)


def source_folder() -> Path | None:
    """The folder of APT's sources where they are installed in place, or used without being
    installed; None for an installed copy."""
    here = Path(__file__).resolve().parent.parent
    try:
        told = _direct_url()
    except PackageNotFoundError:
        return here
    url = urlsplit(told.get("url", ""))
    editable = isinstance(told.get("dir_info"), dict) and told["dir_info"].get("editable")
    return Path(unquote(url.path)) if editable and url.scheme == "file" else None


def apt_requirement() -> str:
    """What to give to pip for the APT that runs here: its sources in place, the URL that it was
    installed from, or its name with a version."""
    folder = source_folder()
    if folder is not None:
        return f"-e {folder.as_uri()}"
    told = _direct_url()
    url, of_vcs = told.get("url"), told.get("vcs_info")
    if isinstance(url, str) and isinstance(of_vcs, dict):
        return f"{OWN} @ {of_vcs.get('vcs')}+{url}@{of_vcs.get('commit_id')}"
    if isinstance(url, str) and not (url.startswith("file:") and not _is_there(url)):
        return f"{OWN} @ {url}"
    return f"{OWN}=={version(OWN)}"


def _is_there(url: str) -> bool:
    return os.path.exists(unquote(urlsplit(url).path))


def _direct_url() -> dict[str, Any]:
    """Where APT was installed from (PEP 610); empty if from an index. Raises PackageNotFoundError
    if it is not installed."""
    text = distribution(OWN).read_text("direct_url.json") or "{}"
    try:
        told = json.loads(text)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _hide_unreadable_entry_points() -> None:
    """Make unreadable distributions look as if they had no entry points.

    Libraries that ask every distribution for entry points, as torch does at import, would fail on
    them.
    """

    def readable(dist: Distribution) -> Any:
        try:
            return _read_entry_points(dist)
        except Exception:
            return EntryPoints()

    Distribution.entry_points = property(readable)  # type: ignore[method-assign, assignment]


def _raise_unless_missing(folder: str) -> None:
    """Raise OSError where the file of entry points exists and cannot be read.

    ``read_text`` returns None for that, as for a file that is missing.
    """
    with suppress(FileNotFoundError, NotADirectoryError), open(f"{folder}/entry_points.txt"):
        pass


def _name_and_version(dist: Distribution, folder: str, problems: list[Problem]) -> tuple[str, str]:
    """Name and version from the metadata, else from the name of their folder.

    Reads the head of the file only: parsing all metadata takes longer than listing all plugins.
    """
    try:
        text = dist.read_text("METADATA") or dist.read_text("PKG-INFO") or ""
        head = text.partition("\n\n")[0].splitlines()
        fields = dict(line.split(": ", 1) for line in head if ": " in line)
        return fields["Name"].strip(), fields["Version"].strip()
    except (KeyError, OSError, ValueError) as error:
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else one_line(error)
        problems.append(Problem(f"its metadata cannot be read: {reason}", folder, hint=HINT))
        name, _, version = PurePath(folder).stem.partition("-")
        return name, version
