"""Asks plugins that are not active what they declare, for listings and to attribute keys of a
profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from apt_core.discovery import Installed, LoadError, entry_for, load, plugin_name
from apt_core.errors import ConfigError, PluginError, Problem
from apt_core.plugin_manager import PluginManager
from apt_core.plugin_records import PluginRecord
from apt_core.process_watch import EarlyWatch
from apt_core.types import PluginFailure, ProviderSpec, SectionSpec


@dataclass
class Declared:
    """The declarations of one plugin outside of a run. ``problem`` says why it could not be
    asked."""

    record: PluginRecord
    providers: list[ProviderSpec] = field(default_factory=list)
    sections: list[SectionSpec] = field(default_factory=list)
    problem: Problem | None = None


def declared_by(
    reference: str, installed: Mapping[str, Installed], manager: PluginManager | None = None
) -> Declared:
    """Load and register one plugin and ask what it declares; never raises.

    It is registered with ``manager``, by default with one of its own. A plugin that cannot be
    loaded, registered or asked has a record in the state broken.
    """
    manager = manager or PluginManager()
    entry = entry_for(reference, installed)
    record = PluginRecord(plugin_name(reference, installed))
    if entry is not None:
        record.dist, record.version = entry.dist, entry.version
    try:
        plugin, record = load(reference, installed)
        manager.register(plugin, record.name, record=record)
    except LoadError as error:
        return broken(record, error.problem, error.details)
    except ConfigError as error:
        return broken(record, error.problems[0])
    record.state = "available"
    return ask(manager, record)


class AvailablePlugins:
    """The declarations of ``installed`` plugins that are not active in the run of ``manager``; each
    is imported and asked once, on demand."""

    def __init__(self, manager: PluginManager, installed: Mapping[str, Installed]) -> None:
        self.installed = installed
        self._manager = manager
        self._declared: dict[str, Declared] = {}

    def declared_by(self, name: str, reference: str = "") -> Declared:
        """Ask the plugin, which is loaded by ``reference``, by default its name; never raises."""
        if name not in self._declared:
            self._manager.watch = self._manager.watch or EarlyWatch()
            with self._manager.watching(name, "its import"):
                self._declared[name] = declared_by(reference or name, self.installed)
        return self._declared[name]


def ask(manager: PluginManager, record: PluginRecord) -> Declared:
    """Ask one registered plugin for its sections and providers.

    A plugin that fails to answer, or answers with something else, is unregistered and broken.
    """
    known = len(record.failures)
    sections = providers = None
    try:
        sections = manager.call_plugin(record.name, "apt_register_config")
        providers = manager.call_plugin(record.name, "apt_register_providers")
    except PluginError:
        # Its recorded failure is reported below.
        if len(record.failures) == known:
            raise
    failed = record.failures[known:]
    problem = None
    if failed:
        problem = Problem(
            f"{failed[0].hook} failed: {failed[0].error}",
            key=f"plugin {record.name}",
            where=failed[0].where,
        )
    if problem is not None:
        manager.unregister(name=record.name)
        return broken(record, problem)
    owned = [replace(section, plugin=record.name) for section in sections or ()]
    return Declared(record, providers or [], owned)


def broken(record: PluginRecord, problem: Problem, details: str = "") -> Declared:
    """The record of a plugin that cannot be used, with the reason as its failure."""
    record.state, record.reason = "broken", _reason(record.name, problem)
    if not record.failures:
        record.failures.append(
            PluginFailure(record.name, "import", 0, record.reason, problem.where, 1, False, details)
        )
    return Declared(record, problem=problem)


def _reason(name: str, problem: Problem) -> str:
    """The text of a problem without the plugin's name; for a failed hook with its name and the
    remedy."""
    hook = problem.key.removeprefix(f"plugin {name}").removeprefix(", ")
    if not hook:
        return problem.message
    return f"{hook}: {problem.message}" + (f" ({problem.hint})" if problem.hint else "")
