"""Selects a run's plugins: ``plugins:`` of the profile, ``--plugin``, trackers; not ``no:NAME``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apt_core.discovery import Installed, entry_for, plugin_name
from apt_core.errors import Problem
from apt_core.plugin_names import MAX_PLUGINS, NO, is_file_reference
from apt_core.profile_paths import found_path

COMMAND_LINE = "--plugin"
"""Where a plugin was named that is not one of the profile."""


@dataclass(frozen=True)
class Wanted:
    """One plugin that was asked for: ``reference`` is a name, a dotted module or a path."""

    name: str
    reference: str
    priority: int | None = None
    on_failure: str | None = None
    where: str = ""

    def as_profile(self) -> dict[str, Any]:
        """An item of the profile's ``plugins:`` list, with the absolute path of a file."""
        reference = self.reference
        if is_file_reference(reference):
            reference = found_path(reference)
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
    installed: Mapping[str, Installed],
    *,
    where: str = "",
    folder: Path | None = None,
) -> Selection:
    """Read the ``plugins:`` list of a profile (as it stands, unchecked) and ``--plugin`` values.

    Items of the list that have no name are passed over: checking the profile reports them. A path
    in the list is looked for in ``folder``, where the profile lies that has the list, and then in
    the working directory; the others are there alone.
    """
    selecting = _Selecting(installed)
    # The check of the profile reports a value that is no list, or too long.
    for item in listed if isinstance(listed, list) and len(listed) <= MAX_PLUGINS else []:
        options: Mapping[str, Any] = item if isinstance(item, Mapping) else {"name": item}
        reference = options.get("name")
        if isinstance(reference, str) and reference.strip():
            selecting.listed(reference.strip(), options, where, folder)
    given: list[str] = []
    for text in references:
        if not text.strip():
            selecting.selection.problems.append(Problem("needs the name of a plugin", "--plugin"))
        given += (part.strip() for part in text.split(","))
    if len(given) > MAX_PLUGINS:
        message = f"names {len(given):,} plugins, and may name {MAX_PLUGINS:,}"
        selecting.selection.problems.append(Problem(message, "--plugin"))
    else:
        for reference in given:
            if reference.startswith(NO):
                selecting.left_out(reference.removeprefix(NO).strip())
            elif reference:
                selecting.add(Wanted("", _beside(reference, None), where=COMMAND_LINE))
    selection = selecting.selection
    selection.listed.update(selection.wanted)
    for name in selection.blocked:
        if name in selection.wanted:
            selection.blocked[name] = selection.wanted.pop(name).reference
    return selection


class _Selecting:
    def __init__(self, installed: Mapping[str, Installed]) -> None:
        self.installed = installed
        self.selection = Selection()

    def listed(
        self, reference: str, options: Mapping[str, Any], where: str, folder: Path | None
    ) -> None:
        """Add an item of the profile's list."""
        if reference.startswith(NO):
            self._problem(
                "a list names what runs",
                reference.removeprefix(NO).strip(),
                where,
                f"take the plugin out of the list, or leave it out of a run: --plugin {reference}",
            )
            return
        priority, on_failure = options.get("priority"), options.get("on_failure")
        if isinstance(priority, bool) or not isinstance(priority, int):
            priority = None
        self.add(
            Wanted(
                "",
                _beside(reference, folder),
                priority if priority is not None and 0 <= priority <= 100 else None,
                on_failure if on_failure in ("isolate", "required") else None,
                where,
            )
        )

    def left_out(self, reference: str) -> None:
        if reference:
            self.selection.blocked[plugin_name(reference, self.installed)] = reference
        else:
            hint = "such as --plugin no:moe"
            self.selection.problems.append(Problem("no: needs a name", "--plugin", hint=hint))

    def add(self, wanted: Wanted) -> None:
        """Add a plugin. One that is listed twice keeps the options of the first listing;
        contradicting options are a problem."""
        wanted = replace(wanted, name=plugin_name(wanted.reference, self.installed))
        if not wanted.name:
            self.selection.problems.append(
                Problem(f"{wanted.reference!r} names no plugin", "plugins", wanted.where)
            )
            return
        known = self.selection.wanted.setdefault(wanted.name, wanted)
        if not self._same(known.reference, wanted.reference):
            self._problem(
                f"both {known.reference!r} and {wanted.reference!r} would have this name",
                wanted.name,
                wanted.where,
                "rename one of them",
            )
        elif wanted.where != COMMAND_LINE and _options(known) != _options(wanted):
            self._problem(
                f"named twice, with different options: {_shown(known)} and {_shown(wanted)}",
                wanted.name,
                wanted.where,
                "keep one of them",
            )

    def _problem(self, message: str, name: str, where: str, hint: str) -> None:
        self.selection.problems.append(Problem(message, f"plugin {name}", where, hint))

    def _same(self, one: str, other: str) -> bool:
        """Whether two references load the same plugin."""
        if is_file_reference(one) and is_file_reference(other):
            return Path(one).resolve() == Path(other).resolve()
        return self._module(one) == self._module(other)

    def _module(self, reference: str) -> str:
        entry = entry_for(reference, self.installed)
        return entry.offers[0].value if entry else reference


def _beside(reference: str, folder: Path | None) -> str:
    if not is_file_reference(reference):
        return reference
    reference = os.path.expanduser(reference)
    beside = folder / reference if folder is not None else None
    return str(beside) if beside is not None and beside.exists() else reference


def _options(wanted: Wanted) -> tuple[int | None, str | None]:
    return wanted.priority, wanted.on_failure


def _shown(wanted: Wanted) -> str:
    options = {"priority": wanted.priority, "on_failure": wanted.on_failure}
    given = [f"{key}: {value}" for key, value in options.items() if value is not None]
    return f"{wanted.reference!r} ({', '.join(given) or 'without options'})"


def turned_on(data: Mapping[str, Any]) -> list[str]:
    """The plugins of trackers that a profile turns on by ``monitoring.NAME.enabled``."""
    monitoring = data.get("monitoring")
    return [
        name
        for name, settings in (monitoring.items() if isinstance(monitoring, Mapping) else ())
        if isinstance(settings, Mapping) and settings.get("enabled") is True
    ]
