"""Checks the whole profile against the declarations of its plugins: all problems and inactive keys.

Single keys and the core's sections are checked by :mod:`apt_core.config`; this module adds what
plugins, providers and schedules say of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from apt_core.activation import Activated
from apt_core.catalogue import Catalogue
from apt_core.config import (
    Config,
    InactiveKey,
    PluginRequest,
    Source,
    Validated,
    check_files,
    check_task_files,
    inactive_core_settings,
    refusal,
    validate,
    written_inactive,
)
from apt_core.config.schedule_check import check_stages
from apt_core.config.secret_fields import masks_in
from apt_core.config.yaml_text import KeyPath, dotted
from apt_core.declarations import AvailablePlugins
from apt_core.discovery import Installed
from apt_core.error_text import one_line, shown
from apt_core.errors import ConfigError, Problem, StopTraining, did_you_mean
from apt_core.kinds import Named
from apt_core.plugin_manager import PluginManager
from apt_core.provider_keys import (
    check_providers,
    data_files,
    inactive_provider_settings,
    unread_paths,
    used_providers,
)
from apt_core.providers.base import SettingsError, read_settings
from apt_core.providers.dataset import mixture_param
from apt_core.schedules import check_schedules
from apt_core.secrets import SecretValues
from apt_core.types import Inactive, SectionSpec


@dataclass(frozen=True)
class NotActive:
    """What is of plugins that are not active: ``sections`` and schedule ``params`` of those that
    were left out, each with the reason, and the ``available`` sections of the other installed ones.
    ``unknown``: not all that were left out could be asked what they have."""

    sections: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    available: Sequence[SectionSpec] = ()
    unknown: bool = False


@dataclass(frozen=True)
class Checked:
    """The result of checking a profile; ``config`` is None if the profile is invalid. The other
    fields are those of the kernel."""

    config: Config | None
    providers: Named
    available: Sequence[SectionSpec]
    inactive: list[InactiveKey]
    inactive_settings: Sequence[Inactive]
    problems: list[Problem]
    notices: list[str]
    secrets: SecretValues


def check_profile(
    source: Source,
    plugins: Activated,
    manager: PluginManager,
    available: AvailablePlugins,
    *,
    files: bool,
) -> Checked:
    """Check the profile and show it to every plugin; bad input never raises.

    With ``files``, data files that the profile names must be there.
    """
    source = _without_masks(source)
    names, sections = plugins.names, plugins.sections
    validated = validate(source, sections, active=names)
    others = _not_active(source, plugins, validated, available)
    if others != NotActive():
        validated = validate(
            source,
            sections,
            others.sections,
            active=names,
            available=others.available,
            lenient=others.unknown,
        )
    config = validated.config
    sources = [item.name for item in config.data.mixture or ()] if config is not None else []
    wrong_schedules, idle_schedules = check_schedules(
        config,
        source,
        plugins=[*names, *sources],
        params={**plugins.params, **{mixture_param(name): name for name in sources}},
        blocked={**plugins.left_out, **others.params},
        lenient=others.unknown,
        permanent=[n for n in names if manager.implements_where(n, lambda p: p.permanent)],
    )
    inactive = [*validated.inactive, *idle_schedules]
    problems = [*plugins.providers.problems, *validated.problems, *wrong_schedules]
    named: Named = {}
    inactive_settings: list[Inactive] = []
    if config is not None:
        named = used_providers(config, sections)
        inactive_settings, wrong = _inactive_settings(config, plugins, named)
        # With --plugin no:NAME the list of plugins is the command line's.
        chosen = ("plugins",) if plugins.blocked else ()
        reported = {item.key for item in inactive}
        vain = written_inactive(config, source, inactive_settings, chosen)
        inactive += [item for item in vain if not _is_within(item.key, reported)]
        inactive += unread_paths(config, plugins.providers)
        problems += _problems_of_mixture(config, source, names)
        problems += _problems_of_sources(config, source, sections, plugins.providers)
        problems += [*wrong, *check_providers(named, plugins.providers, source)]
        if files:
            problems += check_files(config, source, data_files(config, plugins.providers))
            problems += check_task_files(config, source)
        # The list as it took effect, with what the command line added and left out.
        requests = [PluginRequest.model_validate(wanted.as_profile()) for wanted in plugins.wanted]
        config = config.model_copy(update={"plugins": tuple(requests)})
        for section in sections:
            problems += _problems_of_plugin(config, source, section)
        problems += _configure(config, manager)
        wrong_stages, late_stages = _check_stages(config, source, manager)
        problems += wrong_stages
        inactive += late_stages
    needless, needless_notices = _needless_blocks(plugins, inactive, manager, available.installed)
    problems += needless
    if manager.strict:
        problems += _strict_problems(source, plugins, others, inactive)
    return Checked(
        config=config,
        providers=named,
        available=others.available,
        inactive=inactive,
        inactive_settings=inactive_settings,
        problems=problems,
        notices=[*validated.notices, *needless_notices],
        secrets=validated.secrets,
    )


def _problems_of_mixture(
    config: Config, source: Source, plugins: Collection[str]
) -> Iterator[Problem]:
    """Problems of the names of a mixture's sources, which schedules use as they do plugins'."""
    seen: set[str] = set()
    for number, item in enumerate(config.data.mixture or ()):
        path: KeyPath = ("data", "mixture", number, "name")
        where = source.where(path)
        if item.name in plugins:
            message = f"{item.name!r} is an active plugin too, so that schedules could mean either"
            yield Problem(message, dotted(path), where, "choose another name")
        if item.name in seen:
            message = f"{item.name!r} names two sources"
            yield Problem(message, dotted(path), where, "choose another name")
        seen.add(item.name)


def _problems_of_sources(
    config: Config, source: Source, sections: Sequence[SectionSpec], known: Catalogue
) -> Iterator[Problem]:
    """Problems of the settings of a mixture's sources, which are those of their providers'
    sections."""
    specs = {spec.name: spec for spec in known.specs("dataset")}
    models = {each.path: each.model for each in sections}
    for number, item in enumerate(config.data.mixture or ()):
        spec = specs.get(item.dataset_name)
        if spec is None or not item.settings:
            continue
        path: KeyPath = ("data", "mixture", number, "settings")
        where, model = source.where(path), models.get(spec.section)
        if spec.section in ("", "data"):
            message = f"nothing reads it: dataset:{spec.name} has no settings of its own"
            yield Problem(message, dotted(path), where, "leave it out")
        elif model is not None:
            try:
                read_settings(model, item.settings, dotted(path))
            except SettingsError as error:
                yield from (replace(problem, where=where) for problem in error.problems)


def _without_masks(source: Source) -> Source:
    """The source with a problem for each mask that stands for a secret: no plugin is to be shown
    one as if it were the secret."""
    masks = (_mask_problem(source, path) for path in masks_in(source.data))
    return replace(source, problems=(*source.problems, *masks))


def _mask_problem(source: Source, path: KeyPath) -> Problem:
    option = dotted(tuple(takewhile(lambda key: isinstance(key, str), path)))
    return Problem(
        "is the mask of a secret, not the secret",
        dotted(path),
        source.where(path),
        f"give the secret itself, in the profile or as --{option} VALUE",
    )


# Plugins that are not active -------------------------------------------------------------------


def _not_active(
    source: Source, plugins: Activated, validated: Validated, available: AvailablePlugins
) -> NotActive:
    """Ask plugins that are not active for their sections and schedule parameters.

    One is imported only when the profile has keys that no active plugin claims.
    """
    sections: dict[str, str] = {}
    params: dict[str, str] = {}
    unknown = False
    schedules = source.data.get("schedules")
    unclaimed = validated.problems or (isinstance(schedules, Mapping) and schedules)
    for name, reason in plugins.left_out.items() if unclaimed else ():
        sections.update({name: reason, f"model.{name}": reason, f"monitoring.{name}": reason})
        if name not in plugins.blocked:
            unknown = True
            continue
        declared = available.declared_by(name, plugins.blocked[name])
        unknown = unknown or declared.problem is not None
        for section in declared.sections:
            if section.path:
                sections[section.path] = reason
            params.update(dict.fromkeys(section.schedule_params, reason))
    names: Sequence[str] = ()
    if not all(_is_within(dotted(path), sections) for path in validated.unknown):
        names = [n for n in available.installed if n not in plugins.names | plugins.left_out.keys()]
    available_sections = (
        section for name in names for section in available.declared_by(name).sections
    )
    return NotActive(sections, params, tuple(available_sections), unknown)


def _is_within(path: str, sections: Collection[str]) -> bool:
    return any(f"{path}.".startswith(f"{section}.") for section in sections)


def _needless_blocks(
    plugins: Activated,
    inactive: Sequence[InactiveKey],
    manager: PluginManager,
    installed: Mapping[str, Installed],
) -> tuple[list[Problem], list[str]]:
    """Report every ``no:NAME`` that blocked nothing. One that names no plugin is a problem: it is
    probably misspelt, so that the plugin it meant would run."""
    problems: list[Problem] = []
    notices: list[str] = []
    reasons = {item.reason for item in inactive}
    for name in sorted(plugins.needless):
        if plugins.left_out[name] in reasons:
            continue
        message = f"--plugin no:{plugins.blocked[name]} left nothing out"
        if name in installed:
            notices.append(f"{message}: the profile does not ask for this plugin")
            continue
        hint = did_you_mean(name, [wanted.name for wanted in plugins.wanted])
        hint = hint or did_you_mean(name, installed)
        message += ": no plugin of this name is installed or listed"
        del manager.records[name]
        if manager.strict:
            problems.append(Problem(message, hint=hint))
        else:
            notices.append(message + (f" ({hint})" if hint else ""))
    return problems, notices


def _strict_problems(
    source: Source, plugins: Activated, others: NotActive, inactive: Sequence[InactiveKey]
) -> Iterator[Problem]:
    """The problems of inactive keys under ``--strict``, except those of blocked plugins."""
    reasons = set(plugins.left_out.values())
    for item in inactive:
        if item.reason not in reasons and not (others.unknown and item.unclaimed):
            yield refusal(item, source.where(item.key))


# What plugins say ------------------------------------------------------------------------------


def _inactive_settings(
    config: Config, plugins: Activated, named: Named
) -> tuple[list[Inactive], list[Problem]]:
    """Every setting that has no effect in this run, as the core, the providers and the plugins
    tell it, and which plugins cannot tell."""
    sections = plugins.sections
    inactive_settings = [
        *inactive_core_settings(config, plugins.names, {section.path for section in sections}),
        *inactive_provider_settings(named, plugins.providers, sections),
    ]
    problems = []
    for section in sections:
        try:
            inactive_settings += [
                Inactive(str(item.key), str(item.reason), tuple(map(str, item.because)))
                for item in (section.inactive(config) if section.inactive else ())
            ]
        except Exception as error:  # foreign code
            message = f"its check of inactive settings failed: {one_line(error)}"
            problems.append(Problem(message, section.path))
    return inactive_settings, problems


def _problems_of_plugin(config: Config, source: Source, section: SectionSpec) -> Sequence[Problem]:
    """The problems that a plugin's check finds in its section, with the place of each key."""
    if section.check is None:
        return ()
    try:
        return [
            Problem(
                f"plugin {section.plugin}: {problem.message}",
                key := str(problem.key or section.path),
                str(problem.where or source.where(key)),
                str(problem.hint),
            )
            for problem in section.check(config)
        ]
    except Exception as error:  # foreign code
        message = f"its check failed: {one_line(error)}"
        return [Problem(message, section.path, source.where(section.path))]


def _configure(config: Config, manager: PluginManager) -> list[Problem]:
    """Call apt_configure of every plugin, and return all their problems."""
    problems: list[Problem] = []
    for _ in _asked(config, manager, "apt_configure", problems):
        pass
    return problems


def _check_stages(
    config: Config, source: Source, manager: PluginManager
) -> tuple[list[Problem], list[InactiveKey]]:
    """Problems of the stages of the trainable set that plugins declare, and late ones."""
    problems: list[Problem] = []
    inactive: list[InactiveKey] = []
    for name, stages in _asked(config, manager, "apt_trainable", problems):
        wrong, late = check_stages(config, source, name, stages or ())
        problems += wrong
        inactive += late
    return problems, inactive


def _asked(
    config: Config, manager: PluginManager, hook: str, problems: list[Problem]
) -> Iterator[tuple[str, Any]]:
    """Call a hook that judges the profile, of every plugin, and yield what it gives; add what it
    refuses to ``problems``."""
    names = [call.plugin for call in manager.order(hook, dormant=True)]
    for name in dict.fromkeys(names):
        try:
            yield name, manager.call_plugin(name, hook, config=config)
        except ConfigError as error:
            problems += error.problems
        except StopTraining as stop:
            reason = shown(stop.reason)
            problems.append(Problem(f"it stopped the run: {reason}", f"plugin {name}"))
