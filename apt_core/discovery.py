"""Finds and loads plugins: installed entry points, dotted modules and ``.py`` files.

A plugin is imported only when it is loaded. One that cannot be imported, or that exits the
interpreter at import, raises :class:`LoadError` and affects no other plugin.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

from apt_core.code_source import MAX_SOURCE, short_path
from apt_core.distributions import Offer, offers
from apt_core.error_text import formatted, one_line, where_raised
from apt_core.errors import AptError, Problem, did_you_mean
from apt_core.files import read_file
from apt_core.plugin_names import is_file_reference, name_of, normalized_name
from apt_core.plugin_objects import plugin_info
from apt_core.plugin_records import PluginRecord

GROUP = "apt.plugins"
COMMAND_GROUP = "apt.commands"
DISABLE_VARIABLE = "APT_DISABLE_PLUGIN_AUTOLOAD"


class LoadError(AptError):
    """The ``plugin`` cannot be loaded; ``problem`` says why and where. By default the hint says how
    to do without it."""

    exit_code = 2

    def __init__(
        self, plugin: str, message: str, hint: str = "", where: str = "", details: str = ""
    ) -> None:
        self.problem = Problem(message, f"plugin {plugin}", where, hint or _remedy(plugin))
        self.details = details
        super().__init__(str(self.problem))


@dataclass(frozen=True)
class Installed:
    """The offers of installed distributions for one name; more than one is a clash."""

    name: str
    offers: tuple[Offer, ...]

    @property
    def dist(self) -> str:
        return ", ".join(sorted({offer.dist for offer in self.offers}))

    @property
    def version(self) -> str:
        offers = sorted(self.offers, key=lambda offer: offer.dist)
        return ", ".join(dict.fromkeys(offer.version for offer in offers))


def installed_plugins(
    group: str = GROUP, problems: list[Problem] | None = None
) -> dict[str, Installed]:
    """Every installed plugin, by name; none with APT_DISABLE_PLUGIN_AUTOLOAD=1.

    Adds distributions that cannot be read to ``problems``, and finds the others all the same.
    """
    if os.environ.get(DISABLE_VARIABLE, "") not in ("", "0"):
        return {}
    found: dict[str, dict[str, Offer]] = {}
    for offer in offers(group, [] if problems is None else problems):
        # The names of commands are not normalized: users type them.
        name = normalized_name(offer.point.name) if group == GROUP else offer.point.name
        # A distribution may be found in two places, or list an entry point twice.
        found.setdefault(name, {}).setdefault(f"{offer.dist} {offer.value}", offer)
    return {name: Installed(name, tuple(same.values())) for name, same in sorted(found.items())}


def plugin_name(reference: str, installed: Mapping[str, Installed]) -> str:
    """The name of the plugin that ``reference`` means: that of its entry point, else as
    :func:`apt_core.plugin_names.name_of` derives it."""
    entry = entry_for(reference, installed)
    return entry.name if entry else name_of(reference)


def entry_for(reference: str, installed: Mapping[str, Installed]) -> Installed | None:
    """The installed plugin of this name, or the only one of a distribution of this name; None for
    files and modules."""
    if is_file_reference(reference):
        return None
    name = normalized_name(reference)
    if name in installed:
        entry = installed[name]
        # Normalizing drops dots: a.b as a module is not the plugin a_b.
        dotted = "." in reference and all(offer.point.name != reference for offer in entry.offers)
        return None if dotted else entry
    offered = [
        entry
        for entry in installed.values()
        if any(normalized_name(offer.dist) == name for offer in entry.offers)
    ]
    return offered[0] if len(offered) == 1 else None


def load(reference: str, installed: Mapping[str, Installed]) -> tuple[Any, PluginRecord]:
    """Import the plugin that ``reference`` means; return the object to register, and its record.

    Raises LoadError when there is no such plugin, when two distributions offer one of its name, or
    when importing it fails in any way.
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


def load_installed(entry: Installed) -> Any:
    """Import an installed plugin or command. Raises LoadError for two offers of one name, for an
    invalid entry point, and for a failure at import, whose line it names."""
    if len(entry.offers) > 1:
        dists = sorted({offer.dist for offer in entry.offers})
        one = len(dists) == 1
        offering = f"{dists[0]} offers two plugins" if one else "two distributions offer a plugin"
        offered = sorted(offer.value for offer in entry.offers) if one else dists
        raise LoadError(
            entry.name,
            f"{offering} of this name: {' and '.join(offered)}",
            "uninstall it, or fix its entry points" if one else "uninstall one of them",
        )
    point = entry.offers[0].point
    if point.pattern.match(point.value) is None:
        message = f"its entry point {point.value!r} is not MODULE or MODULE:ATTRIBUTE"
        raise LoadError(entry.name, message, where=f"entry_points.txt of {entry.dist}")
    try:
        return point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _import_failure(entry.name, error, _module_file(point.module)) from None


class _SourceLoader(SourceFileLoader):
    """Compiles the source on every load. Python's cached bytecode is valid while the size of the
    source and the second of its last change are: an edit in that second would run the old code."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(read_file(self.path, MAX_SOURCE), self.path)


def _load_file(path: Path, name: str) -> Any:
    if path.is_dir():
        message = f"{path} is a folder: a plugin is a .py file, or a module by its dotted name"
        raise LoadError(name, message, _contents(path))
    if path.exists() and not path.is_file():
        message = f"{path} is not a regular file: a plugin is a .py file"
        raise LoadError(name, message)
    if not path.is_file():
        neighbours = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise LoadError(name, f"there is no file {path}", did_you_mean(path.name, neighbours))
    module_name = file_module(name)
    loader = _SourceLoader(module_name, str(path.resolve()))
    spec = importlib.util.spec_from_file_location(module_name, path.resolve(), loader=loader)
    if spec is None or spec.loader is None:
        raise LoadError(name, f"{path} is not a Python file")
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


def file_module(name: str) -> str:
    """The module name under which the file of plugin ``name`` is loaded."""
    return f"apt_plugin_{name}"


def _load_module(reference: str, name: str, installed: Mapping[str, Installed]) -> Any:
    """Import a dotted module, from the working directory if no other folder has it.

    The working directory then stays at the end of the path, for modules that the plugin imports
    later.
    """
    message = "no such plugin: not installed, not a module, not a .py file"
    unknown = LoadError(name, message, did_you_mean(reference, installed))
    if _top_level(reference) is None:
        with suppress(FileNotFoundError):  # the working directory was removed
            sys.path.append(os.getcwd())
            if _top_level(reference) is None:
                sys.path.pop()
        if _top_level(reference) is None:
            raise unknown
    try:
        module = importlib.import_module(reference)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{reference}.".startswith(f"{missing}."):
            raise unknown from None
        raise _import_failure(name, error, _module_file(reference)) from None
    if getattr(module, "__file__", None) is None and hasattr(module, "__path__"):
        folder = next(iter(module.__path__), "")
        message = f"{short_path(folder)} is a folder without code of its own, not a plugin"
        raise LoadError(name, message, _contents(Path(folder), reference))
    return module


def _import_failure(name: str, error: BaseException, home: str) -> LoadError:
    what = (
        f"it called sys.exit({error.code!r}) when imported"
        if isinstance(error, SystemExit)
        else f"it cannot be imported: {one_line(error)}"
    )
    return LoadError(name, what, where=where_raised(error, home), details=formatted(error))


def _contents(folder: Path, module: str = "") -> str:
    """A hint that lists files of ``folder``, as paths or as submodules of ``module``."""
    files = sorted(file for file in folder.glob("*.py") if file.name != "__init__.py")
    names = [f"{module}.{file.stem}" if module else str(file) for file in files[:5]]
    return f"in it: {', '.join(names)}" if names else ""


def _remedy(name: str) -> str:
    return (
        f"leave it out with --plugin no:{name}, or list it as "
        f"{{name: {name}, on_failure: isolate}} to run without it"
    )


def _top_level(module: str) -> ModuleSpec | None:
    """The spec of the first part of a dotted name. Finding the others would import it."""
    try:
        return importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return None


def _module_file(module: str) -> str:
    spec = _top_level(module)
    return spec.origin or "" if spec else ""
