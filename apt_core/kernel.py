"""From a profile and a choice of plugins to a kernel that can run: the wiring of everything light.

:func:`boot` reads the profile, loads the plugins that it and the command line name, lets them
declare their sections, schedule parameters and providers, and checks the whole. Every problem is
reported at once, before anything is built; nothing here imports torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from apt_core.code_source import source_sha256
from apt_core.config import (
    Config,
    InactiveKey,
    Override,
    PluginRequest,
    Source,
    Validated,
    check_files,
    core_text,
    read_profile,
    unused_settings,
    validate,
    written_in_vain,
)
from apt_core.config.schema import DEFAULT_HOOK_TIMEOUT
from apt_core.config.secret_fields import masks_in
from apt_core.config.yaml_text import KeyPath, dotted
from apt_core.declarations import Declared, ask, broken, declared_by
from apt_core.discovery import LoadError, installed_plugins, load
from apt_core.error_text import one_line, shown
from apt_core.errors import ConfigError, Problem, StopTraining, did_you_mean
from apt_core.kinds import KINDS, Named, named_providers, naming_keys
from apt_core.log import get_logger, of_one_run
from apt_core.plugin_checks import misplaced_hooks
from apt_core.plugin_manager import PluginManager
from apt_core.plugin_records import PluginRecord
from apt_core.process_watch import EarlyWatch
from apt_core.registry import Probe, Registry
from apt_core.schedules import Schedule, check_schedules
from apt_core.secrets import SecretValues
from apt_core.selection import Wanted, select
from apt_core.types import CORE, SectionSpec, Unused

log = get_logger("apt")

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Variables of the environment by which a process knows its place among those of a run."""


@dataclass
class Kernel:
    """A checked profile with its plugins, providers and schedule.

    ``providers`` are those that the profile uses, ``sections`` those of the plugins, ``idle`` those
    of installed plugins that are not active, where these had to be asked, and ``observed`` the
    sections of plugins that change no weight.
    ``notices`` are facts that the person should see at the start of a run; ``inactive`` the keys
    of the profile that do nothing, with the reason; ``unused`` all settings that have no effect
    beside others, written or not; ``place`` the variables of the launcher (PLACE) from before any
    plugin was loaded; ``secrets`` are kept out of what is printed.
    """

    config: Config
    manager: PluginManager
    registry: Registry
    schedule: Schedule
    schedule_params: Mapping[str, str]
    providers: Named = field(default_factory=dict)
    sections: Sequence[SectionSpec] = ()
    idle: Sequence[SectionSpec] = ()
    observed: Sequence[str] = ()
    inactive: list[InactiveKey] = field(default_factory=list)
    unused: Sequence[Unused] = ()
    notices: list[str] = field(default_factory=list)
    place: Mapping[str, str] = field(default_factory=dict)
    secrets: SecretValues = field(default_factory=SecretValues, repr=False)


DATA_PATHS = ("train_path", "val_path")


def data_files(config: Config, registry: Registry) -> tuple[str, ...]:
    """The keys of ``data`` that the text's provider reads as files, as far as it tells."""
    told = _told_files(config, registry) or ()
    return tuple(key for key in DATA_PATHS if key in told)


def _unread_paths(config: Config, registry: Registry) -> Iterator[InactiveKey]:
    """Paths that the text's provider says it does not read."""
    told = _told_files(config, registry)
    if told is None:
        return
    for key in DATA_PATHS:
        if getattr(config.data, key) is not None and key not in told:
            reason = f"dataset:{config.data.dataset_name} does not read it"
            yield InactiveKey(f"data.{key}", reason)


def _told_files(config: Config, registry: Registry) -> Sequence[str] | None:
    name = config.data.dataset_name
    return next((spec.files for spec in registry.specs("dataset") if spec.name == name), None)


def _named_in(config: Config, sections: Sequence[SectionSpec]) -> Named:
    """The providers that a checked profile uses."""
    data = config.to_dict()
    # Without any text that is named, it is a built-in one.
    data["data"]["source"] = config.data.text_source
    return named_providers(data, sections)


def boot(
    profile: str | Path | Mapping[str, Any] | Config,
    *,
    plugins: Sequence[str] = (),
    overrides: Sequence[Override] = (),
    strict: bool = False,
    manager: PluginManager | None = None,
    probe: Probe | None = None,
    files: bool = True,
) -> Kernel:
    """Read, load, declare, check.

    ``plugins`` are references as ``--plugin`` takes them: names, dotted modules, ``.py`` paths,
    comma lists, and ``no:NAME``. ``manager`` may hold plugins that are registered already.
    ``files=False`` leaves the data files unchecked (a dry run needs none).

    Raises ConfigError with every problem that was found.
    """
    if isinstance(profile, str | Path):
        source = read_profile(profile, overrides)
    else:
        data = profile.to_dict(secrets=True) if isinstance(profile, Config) else profile
        source = core_text(Source.from_dict(data).with_overrides(overrides))
    manager = manager or PluginManager()
    manager.strict = strict = strict or manager.strict
    asked = bool(plugins or source.data.get("plugins") or manager.list_name_plugin())
    with (
        of_one_run(),
        before_the_run(),
        manager.hook_deadline(_hook_timeout(source) if asked else 0.0),
    ):
        starting = _Boot(source, manager, strict)
        starting.load_plugins(plugins)
        starting.activate_for_providers()
        return starting.check(probe, files)


def _hook_timeout(source: Source) -> float:
    """As the profile says it, which is not checked yet."""
    training = source.data.get("training")
    asked = training.get("hook_timeout") if isinstance(training, Mapping) else None
    if isinstance(asked, int | float) and 0 <= asked < math.inf:
        return float(asked)
    return DEFAULT_HOOK_TIMEOUT


@contextmanager
def before_the_run() -> Iterator[None]:
    """Raise ConfigError where a plugin stops the run inside: nothing has begun that could end."""
    try:
        yield
    except StopTraining as stop:
        reason = shown(stop.reason)
        raise ConfigError(f"a plugin stopped the run before it began: {reason}") from stop


def _mask_problem(source: Source, path: KeyPath) -> Problem:
    option = dotted(tuple(takewhile(lambda key: isinstance(key, str), path)))
    return Problem(
        "is the mask of a secret, not the secret",
        dotted(path),
        source.where(path),
        f"give the secret itself, in the profile or as --{option} VALUE",
    )


class _Boot:
    """The steps of :func:`boot`, which share the list of problems."""

    def __init__(
        self,
        source: Source,
        manager: PluginManager,
        strict: bool,
    ) -> None:
        self.place = {name: os.environ[name] for name in PLACE if name in os.environ}
        self.source = source
        self.manager = manager
        self.strict = strict
        damaged: list[Problem] = []
        self.installed = installed_plugins(problems=damaged)
        self.problems: list[Problem] = []
        self.notices = [str(problem) for problem in damaged]
        self.sections: list[SectionSpec] = []
        self.observed: list[str] = []
        self.params: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.blocked: dict[str, str] = {}
        self.spared: set[str] = set()
        self.active: list[Wanted] = []
        self.asked: dict[str, Declared] = {}

    def load_plugins(self, references: Sequence[str]) -> None:
        """Load and register what was asked for, and ask each plugin for its declarations."""
        selection = select(
            self.source.data.get("plugins"),
            references,
            self.installed,
            where=self.source.where("plugins"),
            folder=self.source.folder_of(("plugins",)),
        )
        self.problems += selection.problems
        self.blocked = selection.blocked
        self.spared = {
            name
            for name in selection.blocked
            if name not in selection.listed and not self.manager.has_plugin(name)
        }
        for name in selection.blocked:
            if self.manager.has_plugin(name):
                self.manager.unregister(name=name)
            self.left_out[name] = f"plugin {name} is blocked"
            self.manager.records[name] = PluginRecord(name, state="blocked", reason=f"no:{name}")
        if selection.wanted or self.manager.list_name_plugin():
            self._begin_to_watch()
        for name, _ in self.manager.list_name_plugin():
            self._take(ask(self.manager, self.manager.records[name]), Wanted(name, name))
        for wanted in selection.wanted.values():
            self._load(wanted)

    def _begin_to_watch(self) -> None:
        if self.manager.watch is None:
            self.manager.watch = EarlyWatch()

    def _load(self, wanted: Wanted) -> None:
        record = PluginRecord(wanted.name)
        try:
            with self.manager.watching(wanted.name, "its import"):
                plugin, record = load(wanted.reference, self.installed)
                record.priority = wanted.priority
                record.on_failure = wanted.on_failure or "isolate"
                self.manager.register(plugin, wanted.name, record=record)
            declared = ask(self.manager, record)
        except LoadError as error:
            declared = broken(record, error.problem, error.details)
            log.debug("%s", error.details)
        except ConfigError as error:
            declared = broken(record, error.problems[0])
            self.problems += error.problems[1:] if wanted.on_failure != "isolate" else ()
        self._take(declared, wanted)

    def _take(self, declared: Declared, wanted: Wanted) -> None:
        """Keep what a plugin declares; a broken one is bad input unless the profile isolates it."""
        name, record = wanted.name, declared.record
        self.manager.records[name] = record
        if declared.problem is None:
            self.active.append(wanted)
            record.source_sha256 = source_sha256(self.manager.get_plugin(name))
            if not self.manager.get_hookcallers(self.manager.get_plugin(name)):
                misplaced = misplaced_hooks(self.manager.get_plugin(name))
                self.notices.append(
                    f"plugin {name} implements no hook, so nothing of it will be called"
                    + (f" ({misplaced})" if misplaced else "")
                )
            self.sections += declared.sections
            if self.manager.only_observes(name):
                self.observed += [s.path for s in declared.sections if s.path]
            for section in declared.sections:
                self.params.update(dict.fromkeys(section.schedule_params, name))
            return
        # Its sections and schedules are not judged: the one problem is the plugin.
        self.left_out[name] = f"plugin {name} is broken"
        if wanted.on_failure == "isolate" and not self.strict:
            self.notices.append(f"plugin {name} is left out: {record.reason}")
            return
        hint = declared.problem.hint or f"leave it out with --plugin no:{name}"
        place = declared.problem.where or wanted.where
        self.problems.append(replace(declared.problem, hint=hint, where=place))

    def activate_for_providers(self) -> None:
        """Activate installed plugins whose providers the profile names."""
        self.registry = Registry(self.manager, strict=self.strict)
        named = named_providers(self.source.data, self.sections)
        missing = [pair for pair in named if not self.registry.has(*pair)]
        if not missing:
            return
        self._begin_to_watch()
        for name in self.installed:
            record = self.manager.records.get(name)
            if record is not None and record.state != "blocked":
                continue
            for spec in self._declared_by(name).providers:
                if (spec.kind, spec.name) not in missing:
                    continue
                if record is not None:
                    self.spared.discard(name)
                    self.registry.note_blocked(spec, f"its plugin {name} is blocked")
                elif not self.manager.has_plugin(name):
                    key = named[spec.kind, spec.name]
                    self._load(Wanted(name, name, where=self.source.where(key)))
                    self.notices.append(f"plugin {name} activated: the profile names {spec.key}")
        self.registry.refresh()

    def _declared_by(self, name: str) -> Declared:
        """What an installed plugin that is not active declares."""
        if name not in self.asked:
            self._begin_to_watch()
            with self.manager.watching(name, "its import"):
                self.asked[name] = declared_by(name, self.installed)
        return self.asked[name]

    def check(self, probe: Probe | None, files: bool) -> Kernel:
        """Check the profile against what the plugins declared; raise every problem at once."""
        self.problems += self.registry.problems
        # No plugin is to be shown a mask as if it were the secret.
        masks = tuple(_mask_problem(self.source, path) for path in masks_in(self.source.data))
        self.source = replace(self.source, problems=(*self.source.problems, *masks))
        names = {wanted.name for wanted in self.active}
        checked = validate(self.source, self.sections, active=names)
        inert, inert_params, lenient = self._attribute_left_out(checked)
        idle = self._idle_sections(checked, {*names, *self.left_out}, inert)
        if inert or idle or lenient:
            checked = validate(
                self.source, self.sections, inert, active=names, idle=idle, lenient=lenient
            )
        config, inactive = checked.config, list(checked.inactive)
        self.notices += checked.notices
        self.problems += checked.problems
        problems, more = check_schedules(
            config,
            self.source,
            plugins=names,
            params=self.params,
            blocked={**self.left_out, **inert_params},
            lenient=lenient,
            permanent=[n for n in names if self.manager.implements_where(n, lambda p: p.permanent)],
        )
        self.problems += problems
        inactive += more
        named: Named = {}
        unused: list[Unused] = []
        if config is not None:
            named = _named_in(config, self.sections)
            unused = list(self._unused(config, named))
            # With --plugin no:NAME the list of plugins is the command line's.
            chosen = ("plugins",) if self.blocked else ()
            told = {item.key for item in inactive}
            vain = written_in_vain(config, self.source, unused, chosen)
            inactive += [item for item in vain if item.key not in told]
            self.problems += self._check_providers(named)
            inactive += _unread_paths(config, self.registry)
            missing = check_files(config, self.source, data_files(config, self.registry))
            self.problems += missing if files else ()
            # The list as it took effect, with what the command line added and left out.
            requests = [PluginRequest.model_validate(wanted.as_profile()) for wanted in self.active]
            config = config.model_copy(update={"plugins": tuple(requests)})
            for section in self.sections:
                self.problems += self._problems_of_plugin(config, section)
            self.problems += self._configure(config)
        self._tell_vain_blocks(inactive)
        if self.strict:
            self.problems += self._strict_problems(inactive, lenient)
        if self.problems or config is None:
            raise ConfigError(self.problems)
        self.registry.profile, self.registry.probe = config, probe
        return Kernel(
            config=config,
            manager=self.manager,
            registry=self.registry,
            schedule=Schedule(config, params=self.params),
            schedule_params=self.params,
            providers=named,
            sections=self.sections,
            idle=idle,
            observed=self.observed,
            inactive=inactive,
            unused=unused,
            notices=self.notices,
            place=self.place,
            secrets=checked.secrets,
        )

    def _tell_vain_blocks(self, inactive: Sequence[InactiveKey]) -> None:
        """Tell of every ``no:NAME`` that left nothing out. One that names no plugin at all is
        likely misspelt, so that what it was to leave out runs."""
        reasons = {item.reason for item in inactive}
        for name in sorted(self.spared):
            if self.left_out[name] in reasons:
                continue
            message = f"--plugin no:{self.blocked[name]} left nothing out"
            if name in self.installed:
                self.notices.append(f"{message}: the profile does not ask for this plugin")
                continue
            running = [wanted.name for wanted in self.active]
            hint = did_you_mean(name, running) or did_you_mean(name, self.installed)
            message += ": no plugin of this name is installed or listed"
            del self.manager.records[name]
            if self.strict:
                self.problems.append(Problem(message, hint=hint))
            else:
                self.notices.append(message + (f" ({hint})" if hint else ""))

    def _configure(self, config: Config) -> list[Problem]:
        """Show the profile to every plugin; what all of them have against it."""
        problems: list[Problem] = []
        names = [call.plugin for call in self.manager.order("apt_configure", dormant=True)]
        for name in dict.fromkeys(names):
            try:
                self.manager.call_plugin(name, "apt_configure", config=config)
            except ConfigError as error:
                problems += error.problems
            except StopTraining as stop:
                reason = shown(stop.reason)
                problems.append(Problem(f"it stopped the run: {reason}", f"plugin {name}"))
        return problems

    def _check_providers(self, named: Named) -> list[Problem]:
        problems = [
            self.registry.check_name(kind, name, key=key, where=self.source.where(key))
            for (kind, name), key in named.items()
        ]
        conflicts = self.registry.check_conflicts(f"{kind}:{name}" for kind, name in named)
        return [problem for problem in problems if problem] + conflicts

    def _attribute_left_out(
        self, checked: Validated
    ) -> tuple[dict[str, str], dict[str, str], bool]:
        """Sections and parameters of plugins that were left out, so that their keys are inactive.

        Such a plugin is imported only when the profile has keys that nobody else claims, and then
        only to be asked. The third value says that one could not be asked.
        """
        inert: dict[str, str] = {}
        params: dict[str, str] = {}
        lenient = False
        schedules = self.source.data.get("schedules")
        unclaimed = checked.problems or (isinstance(schedules, Mapping) and schedules)
        for name, reason in self.left_out.items() if unclaimed else ():
            inert.update({name: reason, f"model.{name}": reason, f"monitoring.{name}": reason})
            if name not in self.blocked:
                lenient = True
                continue
            declared = declared_by(self.blocked[name], self.installed)
            lenient = lenient or declared.problem is not None
            for section in declared.sections:
                if section.path:
                    inert[section.path] = reason
                params.update(dict.fromkeys(section.schedule_params, reason))
        return inert, params, lenient

    def _idle_sections(
        self, checked: Validated, asked: Collection[str], inert: Mapping[str, str]
    ) -> list[SectionSpec]:
        """The sections of installed plugins that are not active. These are imported only when the
        profile has keys that nobody else claims, and then only to be asked."""
        unclaimed = [
            path
            for path in map(dotted, checked.unknown)
            if not any(f"{path}.".startswith(f"{section}.") for section in inert)
        ]
        names = [name for name in self.installed if name not in asked] if unclaimed else []
        return [section for name in names for section in self._declared_by(name).sections]

    def _unused(self, config: Config, named: Named) -> Iterator[Unused]:
        """Every setting that has no effect in this run, as the core, the providers and the plugins
        tell it."""
        names = {wanted.name for wanted in self.active}
        yield from unused_settings(config, names, {section.path for section in self.sections})
        yield from self._unused_of_providers(named)
        for section in self.sections:
            yield from self._unused_of_plugin(config, section)

    def _unused_of_providers(self, named: Named) -> Iterator[Unused]:
        deciding: dict[str, tuple[str, ...]] = {}
        for kind, keys in naming_keys(self.sections):
            deciding[kind] = deciding.get(kind, ()) + keys
        specs = self.registry.specs()
        used = [spec for spec in specs if (spec.kind, spec.name) in named]
        may_fall_back = {kind for kind, _ in named} - {s.kind for s in used if s.plugin == CORE}
        may_fall_back |= {spec.kind for spec in used if spec.plugin != CORE}
        sections = {spec.section for spec in used} | {
            spec.section for spec in specs if spec.default and spec.kind in may_fall_back
        }
        # A plugin may read its section itself, whichever provider is used.
        shared = {section.path for section in self.sections}
        silent = {spec.kind for spec in used if spec.reads is None}
        silent |= {kind for kind, name in named if not self.registry.knows(kind, name)}
        read = {key for spec in used for key in spec.reads or ()}
        for spec in specs:
            because = deciding[spec.kind]
            own = spec.section.startswith("model.") and spec.section not in shared
            own = own or (not KINDS[spec.kind].fallback and spec.section not in ("", "data"))
            if own and spec.section not in sections:
                yield Unused(spec.section, f"{spec.key} is not used", because)
            for key in spec.reads or ():
                if key not in read and spec.kind not in silent:
                    names = ", ".join(other.name for other in used if other.kind == spec.kind)
                    yield Unused(key, f"{spec.kind}:{names} does not heed it", because)

    def _unused_of_plugin(self, config: Config, section: SectionSpec) -> Sequence[Unused]:
        if section.unused is None:
            return ()
        try:
            return [
                Unused(str(item.key), str(item.reason), tuple(map(str, item.because)))
                for item in section.unused(config)
            ]
        except Exception as error:  # foreign code
            message = f"its check of unused settings failed: {one_line(error)}"
            self.problems.append(Problem(message, section.path))
            return ()

    def _problems_of_plugin(self, config: Config, section: SectionSpec) -> Sequence[Problem]:
        """What a plugin has against its section, with the place of each key."""
        if section.check is None:
            return ()
        try:
            return [
                Problem(
                    f"plugin {section.plugin}: {problem.message}",
                    key := str(problem.key or section.path),
                    str(problem.where or self.source.where(key)),
                    str(problem.hint),
                )
                for problem in section.check(config)
            ]
        except Exception as error:  # foreign code
            message = f"its check failed: {one_line(error)}"
            return [Problem(message, section.path, self.source.where(section.path))]

    def _strict_problems(self, inactive: Sequence[InactiveKey], lenient: bool) -> list[Problem]:
        """An inactive key is an error, unless the person left its plugin out."""
        left_out = set(self.left_out.values())
        return [
            Problem(
                f"it does nothing here: {item.reason}",
                key=item.key,
                where=self.source.where(item.key),
                hint="--strict allows no inactive key",
            )
            for item in inactive
            if item.reason not in left_out and not (lenient and item.unclaimed)
        ]
