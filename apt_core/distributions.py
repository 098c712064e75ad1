"""What installed distributions offer. A damaged one is named, and costs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, EntryPoints, distributions
from pathlib import PurePath
from typing import Any

from apt_core.error_text import one_line
from apt_core.errors import Problem
from apt_core.plugin_names import normalized_name

_read_entry_points = Distribution.entry_points.fget  # type: ignore[attr-defined]

HINT = "reinstall it, or remove what is left of it"


@dataclass(frozen=True)
class Offer:
    """One entry point, and name and version of the distribution that has it."""

    point: EntryPoint
    dist: str
    version: str

    @property
    def value(self) -> str:
        """``module`` or ``module:attribute``."""
        return self.point.value


def offers(group: str, problems: list[Problem]) -> Iterator[Offer]:
    """Every entry point of a group. What cannot be read is added to ``problems``."""
    seen = set()
    for dist in distributions():
        folder = str(getattr(dist, "_path", dist))
        name = normalized_name(PurePath(folder).stem.partition("-")[0])
        if name in seen:  # the first one on the import path counts
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
            _let_others_pass_over()
            continue
        if points:
            shown, version = _name_and_version(dist, folder, problems)
            for point in points:
                yield Offer(point, shown, version)


def _let_others_pass_over() -> None:
    """Let libraries that ask every distribution for entry points, as torch does when it is
    imported, find none in one that cannot be read, rather than fail."""

    def readable(dist: Distribution) -> Any:
        try:
            return _read_entry_points(dist)
        except Exception:
            return EntryPoints()

    Distribution.entry_points = property(readable)  # type: ignore[method-assign, assignment]


def _raise_unless_missing(folder: str) -> None:
    """Raise OSError where there are entry points that cannot be read: the reader tells no more
    than that it has none."""
    with suppress(FileNotFoundError, NotADirectoryError), open(f"{folder}/entry_points.txt"):
        pass


def _name_and_version(dist: Distribution, folder: str, problems: list[Problem]) -> tuple[str, str]:
    """As the metadata have them, else as the name of their folder does.

    The head is all that is looked at: parsing takes longer than a listing.
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
