"""Finding and loading plugins: installed entry points, dotted modules and ``.py`` files.

Nothing is imported until it is asked for, and every load is on its own: a plugin that cannot be
imported, or that exits the interpreter at import, is a :class:`LoadError` and nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import CodeType
from typing import Any

from apt_core.errors import AptError, Problem, did_you_mean
from apt_core.failures import formatted, one_line, short_path, where_raised
from apt_core.plugin_names import is_file_reference, name_of, normalized_name
from apt_core.plugin_records import PluginRecord
from apt_core.validation import plugin_info

GROUP = "apt.plugins"
COMMAND_GROUP = "apt.commands"
DISABLE_VARIABLE = "APT_DISABLE_PLUGIN_AUTOLOAD"


class LoadError(AptError):
    """A plugin that was asked for and cannot be loaded; ``problem`` says what and where."""

    exit_code = 2

    def __init__(self, problem: Problem, details: str = "") -> None:
        super().__init__(str(problem))
        self.problem = problem
        self.details = details


@dataclass(frozen=True)
class Installed:
    """A plugin that an installed distribution offers; more than one entry point is a clash."""

    name: str
    points: tuple[EntryPoint, ...]

    @property
    def dist(self) -> str:
        return ", ".join(sorted({_dist_name(point) for point in self.points}))

    @property
    def version(self) -> str:
        points = sorted(self.points, key=_dist_name)
        return ", ".join(point.dist.version for point in points if point.dist)


def installed_plugins(group: str = GROUP) -> dict[str, Installed]:
    """Every plugin that is installed, by name; none with APT_DISABLE_PLUGIN_AUTOLOAD=1."""
    if os.environ.get(DISABLE_VARIABLE, "") not in ("", "0"):
        return {}
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        # Commands are called as they are written.
        name = normalized_name(point.name) if group == GROUP else point.name
        found.setdefault(name, []).append(point)
    return {name: Installed(name, tuple(points)) for name, points in sorted(found.items())}


def plugin_name(reference: str, installed: Mapping[str, Installed]) -> str:
    """The plugin's name, however it is written: that of the entry point that the reference stands
    for, else see :func:`apt_core.plugin_names.name_of`."""
    entry = entry_for(reference, installed)
    return entry.name if entry else name_of(reference)


def entry_for(reference: str, installed: Mapping[str, Installed]) -> Installed | None:
    """The installed plugin that is meant by its own name, or by that of a distribution that offers
    one plugin; None for files and modules."""
    if is_file_reference(reference):
        return None
    name = normalized_name(reference)
    if name in installed:
        entry = installed[name]
        # A module of another package may end in the same words.
        dotted = "." in reference and all(point.name != reference for point in entry.points)
        return None if dotted else entry
    offered = [
        entry
        for entry in installed.values()
        if any(normalized_name(_dist_name(point)) == name for point in entry.points)
    ]
    return offered[0] if len(offered) == 1 else None


def load(reference: str, installed: Mapping[str, Installed]) -> tuple[Any, PluginRecord]:
    """Import the plugin behind a reference; returns the plugin and its record.

    Raises LoadError when it is not there, when two distributions share its name, or when
    importing it fails in any way.
    """
    name, entry = plugin_name(reference, installed), entry_for(reference, installed)
    record = PluginRecord(name)
    start = time.perf_counter()
    if entry is not None:
        record.dist, record.version = entry.dist, entry.version
        plugin = load_installed(entry)
    elif is_file_reference(reference):
        plugin = _load_file(Path(reference), name)
    else:
        plugin = _load_module(reference, name, installed)
    record.load_ms = round((time.perf_counter() - start) * 1000, 2)
    info = plugin_info(plugin)
    record.summary, record.version = info.summary, info.version or record.version
    return plugin, record


def load_entry_point(point: EntryPoint, name: str) -> Any:
    """Load one entry point; any failure at import is a LoadError that names the line."""
    try:
        return point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _import_failure(name, error, _module_file(point.module)) from None


def load_installed(entry: Installed) -> Any:
    """Load what an installed distribution offers. Raises LoadError, also where two offer it."""
    if len(entry.points) > 1:
        both = " and ".join(sorted(_dist_name(point) for point in entry.points))
        raise LoadError(
            Problem(
                f"two distributions offer a plugin of this name: {both}",
                key=f"plugin {entry.name}",
                hint="uninstall one of them",
            )
        )
    return load_entry_point(entry.points[0], entry.name)


class _SourceLoader(SourceFileLoader):
    """Compiles the file as it is now. Python's kept bytecode is known by size and second of the
    source: an edit within a second of the last run would train on the old code."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _load_file(path: Path, name: str) -> Any:
    if not path.is_file():
        neighbours = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise LoadError(
            Problem(
                f"there is no file {path}",
                key=f"plugin {name}",
                hint=did_you_mean(path.name, neighbours) or _remedy(name),
            )
        )
    module_name = f"apt_plugin_{name}"
    loader = _SourceLoader(module_name, str(path.resolve()))
    spec = importlib.util.spec_from_file_location(module_name, path.resolve(), loader=loader)
    if spec is None or spec.loader is None:
        raise LoadError(Problem(f"{path} is not a Python file", key=f"plugin {name}"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        sys.modules.pop(module_name, None)
        raise _import_failure(name, error, str(path.resolve())) from None
    return module


def _load_module(reference: str, name: str, installed: Mapping[str, Installed]) -> Any:
    """Import a dotted module, from the working directory if it is nowhere else.

    The working directory then stays on the path, at its end: that is where the modules lie which
    the plugin imports on first use.
    """
    unknown = LoadError(
        Problem(
            "no such plugin: not installed, not a module, not a .py file",
            key=f"plugin {name}",
            hint=did_you_mean(reference, installed) or _remedy(name),
        )
    )
    if _top_level(reference) is None:
        sys.path.append(os.getcwd())
        if _top_level(reference) is None:
            sys.path.pop()
            raise unknown
    try:
        return importlib.import_module(reference)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{reference}.".startswith(f"{missing}."):
            raise unknown from None
        raise _import_failure(name, error, _module_file(reference)) from None


def _import_failure(name: str, error: BaseException, home: str) -> LoadError:
    what = (
        f"it called sys.exit({error.code!r}) when imported"
        if isinstance(error, SystemExit)
        else f"it cannot be imported: {one_line(error)}"
    )
    where = where_raised(error, home)
    return LoadError(
        Problem(what, key=f"plugin {name}", where=where, hint=_remedy(name)), formatted(error)
    )


def _remedy(name: str) -> str:
    return (
        f"leave it out with --plugin no:{name}, or list it as "
        f"{{name: {name}, on_failure: isolate}} to run without it"
    )


def _top_level(module: str) -> ModuleSpec | None:
    """Where a module's first part is found. Looking for more of it would run its code."""
    try:
        return importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return None


def _module_file(module: str) -> str:
    spec = _top_level(module)
    return spec.origin or "" if spec else ""


def _dist_name(point: EntryPoint) -> str:
    if point.dist is None:
        return short_path(point.value)
    return str(point.dist.metadata["Name"])
