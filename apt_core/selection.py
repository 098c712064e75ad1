"""Which plugins a run asks for: the profile's ``plugins:`` and ``--plugin``, minus ``no:NAME``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apt_core.discovery import is_file_reference, plugin_name
from apt_core.errors import Problem


@dataclass(frozen=True)
class Wanted:
    """One plugin that was asked for: ``reference`` is a name, a dotted module or a path."""

    name: str
    reference: str
    priority: int | None = None
    on_failure: str | None = None
    where: str = ""

    def as_profile(self) -> dict[str, Any]:
        """As an item of the profile's ``plugins:`` list; a file by its absolute path."""
        reference = self.reference
        if is_file_reference(reference):
            reference = str(Path(reference).resolve())
        return {"name": reference, "priority": self.priority, "on_failure": self.on_failure}


@dataclass
class Selection:
    """The plugins to activate, in order, and those that were blocked: names, with the reference
    by which each would be loaded. ``listed`` are all names, blocked ones too."""

    wanted: dict[str, Wanted] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)
    blocked: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def select(
    listed: Any,
    references: Iterable[str],
    installed: Collection[str],
    *,
    where: str = "",
    folder: Path | None = None,
) -> Selection:
    """Read the ``plugins:`` list of a profile (as it stands, unchecked) and ``--plugin`` values.

    Items of the list that have no name are passed over: checking the profile reports them. A
    relative path in the profile is looked for beside the profile when it is not found from the
    working directory.
    """
    selection = Selection()
    for item in listed if isinstance(listed, list) else []:
        options: Mapping[str, Any] = item if isinstance(item, Mapping) else {"name": item}
        reference = options.get("name")
        if isinstance(reference, str) and reference:
            _add(
                selection,
                _beside(reference, folder),
                installed,
                where,
                options.get("priority"),
                options.get("on_failure"),
            )
    for text in references:
        for reference in (part.strip() for part in text.split(",")):
            if reference.startswith("no:"):
                blocked = reference.removeprefix("no:").strip()
                selection.blocked[plugin_name(blocked, installed)] = blocked
            elif reference:
                _add(selection, reference, installed, "--plugin")
    selection.listed.update(selection.wanted)
    for name in selection.blocked:
        if name in selection.wanted:
            selection.blocked[name] = selection.wanted.pop(name).reference
    return selection


def _add(
    selection: Selection,
    reference: str,
    installed: Collection[str],
    where: str,
    priority: Any = None,
    on_failure: Any = None,
) -> None:
    name = plugin_name(reference, installed)
    known = selection.wanted.get(name)
    if known is not None and not _same(known.reference, reference):
        selection.problems.append(
            Problem(
                f"both {known.reference!r} and {reference!r} would have this name",
                key=f"plugin {name}",
                where=where,
                hint="rename one of them",
            )
        )
    if known is None:
        valid = isinstance(priority, int) and 0 <= priority <= 100
        selection.wanted[name] = Wanted(
            name,
            reference,
            priority if valid else None,
            on_failure if on_failure in ("isolate", "required") else None,
            where,
        )


def _beside(reference: str, folder: Path | None) -> str:
    if not is_file_reference(reference) or Path(reference).exists() or folder is None:
        return reference
    beside = folder / reference
    return str(beside) if beside.exists() else reference


def _same(one: str, other: str) -> bool:
    """Do two references load the same plugin?"""
    if is_file_reference(one) and is_file_reference(other):
        return Path(one).resolve() == Path(other).resolve()
    return one == other
