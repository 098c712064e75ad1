"""Activates the plugins of a run and collects their declarations.

Those that the profile and the command line ask for are loaded and asked for their sections and
providers; then installed ones whose providers the profile names join them, and trackers that it
turns on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from apt_core.catalogue import Catalogue, Pair
from apt_core.code_source import source_sha256
from apt_core.config import Source
from apt_core.declarations import AvailablePlugins, Declared, ask, broken
from apt_core.discovery import Installed, LoadError, load
from apt_core.errors import ConfigError, Problem
from apt_core.kinds import named_providers
from apt_core.log import get_logger
from apt_core.plugin_checks import misplaced_hooks
from apt_core.plugin_manager import PluginManager
from apt_core.plugin_records import PluginRecord
from apt_core.process_watch import EarlyWatch
from apt_core.selection import COMMAND_LINE, Wanted, select, turned_on
from apt_core.types import ProviderSpec, SectionSpec

log = get_logger("apt")


@dataclass(frozen=True)
class Loaded:
    """One plugin that was asked for, or why it is broken. ``reason`` says why it was loaded where
    neither the profile nor the command line lists it."""

    wanted: Wanted
    declared: Declared
    problems: Sequence[Problem] = ()
    reason: str = ""


@dataclass(frozen=True)
class Activated:
    """The plugins of a run.

    ``wanted`` are those that are active, ``sections`` and ``params`` (schedule parameters, with
    the plugin of each) theirs, ``observed`` the paths of sections whose plugin changes no weight.
    ``left_out`` says why others are not: ``blocked`` by the person, with the reference of each, or
    broken. ``needless`` are blocked, and nothing asks for them. ``providers`` are all that keys can
    name.
    """

    wanted: Sequence[Wanted]
    sections: Sequence[SectionSpec]
    params: Mapping[str, str]
    observed: Sequence[str]
    left_out: Mapping[str, str]
    blocked: Mapping[str, str]
    needless: Collection[str]
    providers: Catalogue
    problems: Sequence[Problem]
    notices: Sequence[str]

    @property
    def names(self) -> set[str]:
        return {wanted.name for wanted in self.wanted}


def activate(
    source: Source,
    references: Sequence[str],
    manager: PluginManager,
    available: AvailablePlugins,
) -> Activated:
    """Load, register and ask the plugins of a run.

    ``references`` are those of the command line. A plugin that is broken is a problem, unless the
    profile isolates it.
    """
    selection = select(
        source.data.get("plugins"),
        references,
        available.installed,
        where=source.where("plugins"),
        folder=source.folder_of(("plugins",)),
    )
    needless = {
        name
        for name in selection.blocked
        if name not in selection.listed and not manager.has_plugin(name)
    }
    for name in selection.blocked:
        _block(name, manager)
    if selection.wanted or manager.list_name_plugin():
        manager.watch = manager.watch or EarlyWatch()
    loaded = [_ask(name, manager) for name, _ in manager.list_name_plugin()]
    loaded += [_load(wanted, manager, available.installed) for wanted in selection.wanted.values()]
    named = named_providers(source.data, _sections(loaded))
    known = Catalogue(_providers(loaded))
    missing = {pair: source.where(key) for pair, key in named.items() if pair not in known}
    blocked: list[tuple[ProviderSpec, str]] = []
    for name, spec in _offers(missing, manager, available) if missing else ():
        if name in selection.blocked:
            blocked.append((spec, f"its plugin {name} is blocked"))
            needless.discard(name)
        elif not manager.has_plugin(name):
            wanted = Wanted(name, name, where=missing[spec.kind, spec.name])
            reason = f"plugin {name} activated: the profile names {spec.key}"
            loaded.append(replace(_load(wanted, manager, available.installed), reason=reason))
    for name in turned_on(source.data):
        if name in selection.blocked:
            needless.discard(name)
        elif name in available.installed and not (
            name in selection.wanted or manager.has_plugin(name)
        ):
            # A run is not refused for the sake of a tracker: it is broken, and the key inactive.
            key = f"monitoring.{name}.enabled"
            wanted = Wanted(name, name, on_failure="isolate", where=source.where(key))
            reason = f"plugin {name} activated: the profile says {key}"
            found = _load(wanted, manager, available.installed)
            loaded.append(replace(found, reason=reason if found.declared.problem is None else ""))
    active = [each for each in loaded if each.declared.problem is None]
    sections = _sections(active)
    return Activated(
        wanted=[each.wanted for each in active],
        sections=sections,
        params={name: s.plugin for s in sections for name in s.schedule_params},
        observed=[s.path for s in sections if s.path and manager.only_observes(s.plugin)],
        left_out={
            **{name: f"plugin {name} is blocked" for name in selection.blocked},
            **{
                each.wanted.name: f"plugin {each.wanted.name} is broken"
                for each in loaded
                if each.declared.problem is not None
            },
        },
        blocked=selection.blocked,
        needless=needless,
        providers=Catalogue(_providers(active), blocked),
        problems=[
            *selection.problems,
            *(problem for each in loaded for problem in _problems(each, manager.strict)),
        ],
        notices=[notice for each in loaded for notice in _notices(each, manager)],
    )


def _sections(loaded: Iterable[Loaded]) -> list[SectionSpec]:
    return [section for each in loaded for section in each.declared.sections]


def _providers(loaded: Iterable[Loaded]) -> list[tuple[str, list[ProviderSpec]]]:
    return [(each.wanted.name, each.declared.providers) for each in loaded]


def _block(name: str, manager: PluginManager) -> None:
    if manager.has_plugin(name):
        manager.unregister(name=name)
    manager.records[name] = PluginRecord(name, state="blocked", reason=f"no:{name}")


def _ask(name: str, manager: PluginManager) -> Loaded:
    """Ask a plugin that the caller has registered."""
    declared = ask(manager, manager.records[name])
    return _recorded(Loaded(Wanted(name, name), declared), manager)


def _load(wanted: Wanted, manager: PluginManager, installed: Mapping[str, Installed]) -> Loaded:
    """Load, register and ask one plugin."""
    record = PluginRecord(wanted.name)
    problems: Sequence[Problem] = ()
    try:
        with manager.watching(wanted.name, "its import"):
            plugin, record = load(wanted.reference, installed)
            record.priority = wanted.priority
            record.on_failure = wanted.on_failure or "isolate"
            manager.register(plugin, wanted.name, record=record)
        declared = ask(manager, record)
    except LoadError as error:
        declared = broken(record, error.problem, error.details)
        log.debug("%s", error.details)
    except ConfigError as error:
        declared = broken(record, error.problems[0])
        problems = error.problems[1:]
    return _recorded(Loaded(wanted, declared, problems), manager)


def _recorded(loaded: Loaded, manager: PluginManager) -> Loaded:
    name, record = loaded.wanted.name, loaded.declared.record
    manager.records[name] = record
    if loaded.declared.problem is None:
        record.source_sha256 = source_sha256(manager.get_plugin(name))
    return loaded


def _offers(
    missing: Collection[Pair], manager: PluginManager, available: AvailablePlugins
) -> Iterator[tuple[str, ProviderSpec]]:
    """What installed plugins that are not active, blocked ones included, have of the providers
    that are ``missing``, with the plugin's name."""
    for name in available.installed:
        record = manager.records.get(name)
        if record is None or record.state == "blocked":
            for spec in available.declared_by(name).providers:
                if (spec.kind, spec.name) in missing:
                    yield name, spec


def _may_be_missing(loaded: Loaded, strict: bool) -> bool:
    """Whether the profile allows the run to go on without the plugin."""
    return loaded.wanted.on_failure == "isolate" and not strict


def _problems(loaded: Loaded, strict: bool) -> Iterator[Problem]:
    """The problem of a required plugin that is not active; its sections and schedules are not
    checked then."""
    problem, wanted = loaded.declared.problem, loaded.wanted
    if problem is None or _may_be_missing(loaded, strict):
        return
    hint, leave_out = problem.hint, f"leave it out with --plugin no:{wanted.name}"
    if not hint:
        hint = leave_out
    elif wanted.where != COMMAND_LINE and "--plugin no:" not in hint:
        hint = f"{hint}; {leave_out}"
    yield replace(problem, hint=hint, where=problem.where or wanted.where)
    yield from loaded.problems


def _notices(loaded: Loaded, manager: PluginManager) -> Iterator[str]:
    """Notices about a plugin at the start of the run."""
    name = loaded.wanted.name
    if loaded.declared.problem is None:
        plugin = manager.get_plugin(name)
        if not manager.get_hookcallers(plugin):
            misplaced = misplaced_hooks(plugin)
            yield f"plugin {name} implements no hook, so nothing of it will be called" + (
                f" ({misplaced})" if misplaced else ""
            )
    elif _may_be_missing(loaded, manager.strict):
        yield f"plugin {name} is broken: {loaded.declared.record.reason}"
    if loaded.reason:
        yield loaded.reason
