"""What ``apt-hooks`` shows: plugins, implementations, providers and hooks, without running any."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_core import hookspecs
from apt_core.catalogue import Catalogue, resolve, usable
from apt_core.code_source import short_path, source_of
from apt_core.declarations import Declared, declared_by
from apt_core.discovery import Installed, installed_plugins
from apt_core.error_text import one_line
from apt_core.errors import ConfigError, Problem
from apt_core.hookspecs import POLICIES
from apt_core.kinds import named_providers
from apt_core.plugin_manager import PluginManager
from apt_core.plugin_objects import options_of
from apt_core.plugin_records import PluginRecord
from apt_core.selection import Wanted, select, turned_on
from apt_core.types import ProviderSpec, SectionSpec

if TYPE_CHECKING:
    from apt_core.config import KeyFacts


@dataclass
class Listing:
    """Plugins for a listing: those of a profile and the command line, or all that are installed.

    ``manager`` holds the plugins that hooks are listed for, ``providers`` those of these plugins
    and of every other installed plugin; ``records`` is every plugin that is known. ``sections`` are
    those of the plugins that are listed, ``available`` those of the other installed ones.
    """

    manager: PluginManager
    providers: Catalogue
    records: dict[str, PluginRecord]
    sections: list[SectionSpec] = field(default_factory=list)
    available: list[SectionSpec] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def survey(profile: str = "", plugins: Sequence[str] = ()) -> Listing:
    """Load plugins for a listing.

    With a profile or ``--plugin``, what these name is active and everything else that is installed
    is available; with neither, all installed plugins are listed. A plugin that cannot be loaded is
    broken, and never an error here.
    """
    data, folder, waiting = _read(profile) if profile else ({}, None, set[str]())
    damaged: list[Problem] = []
    installed = installed_plugins(problems=damaged)
    selection = select(data.get("plugins"), plugins, installed, folder=folder)
    chosen = PluginManager()
    everything = PluginManager(listing=True)
    listing = Listing(chosen, Catalogue(), {}, problems=[*damaged, *selection.problems])
    providers: dict[str, Sequence[ProviderSpec]] = {}

    def take(wanted: Wanted) -> None:
        declared = declared_by(wanted.reference, installed, chosen)
        record = declared.record
        record.name, record.priority = wanted.name, wanted.priority
        if record.state != "broken":
            chosen.set_priority(wanted.name, wanted.priority)
            record.state = "dormant" if wanted.name in waiting else "active"
            listing.sections += declared.sections
            providers[wanted.name] = declared.providers
            everything.register(chosen.get_plugin(wanted.name), wanted.name)
        listing.records[wanted.name] = record

    for wanted in selection.wanted.values():
        take(wanted)
    for name in selection.blocked:
        entry = installed.get(name)
        listing.records[name] = PluginRecord(
            name,
            entry.dist if entry else "",
            entry.version if entry else "",
            state="blocked",
            reason=f"no:{name}",
        )
    if data:
        known = Catalogue(providers.items())
        named = {pair for pair in named_providers(data, listing.sections) if pair not in known}
        for name in _activated(data, named, set(installed) - set(listing.records), installed):
            take(Wanted(name, name))
    for name in installed:
        if name not in listing.records:
            declared = declared_by(name, installed, everything)
            listing.records[name] = declared.record
            others = listing.available if selection.wanted or profile else listing.sections
            others += declared.sections
            providers[name] = declared.providers
    if not selection.wanted and not profile:
        listing.manager = everything
    listing.providers = Catalogue(providers.items())
    listing.problems += listing.providers.problems
    if profile:
        blocked = selection.blocked.values()
        listing.problems += _profile_problems(
            profile, listing, lambda: [declared_by(reference, installed) for reference in blocked]
        )
    return listing


def _activated(
    data: Mapping[str, Any],
    named: Collection[tuple[str, str]],
    names: Collection[str],
    installed: Mapping[str, Installed],
) -> list[str]:
    """Those of the plugins ``names`` that a run of this profile activates though it does not list
    them: trackers that it turns on, and what offers the providers ``named`` by it."""
    offering = [
        name
        for name in sorted(names if named else ())
        if any((s.kind, s.name) in named for s in declared_by(name, installed).providers)
    ]
    return sorted({*offering, *(name for name in turned_on(data) if name in names)})


def _profile_problems(
    profile: str, listing: Listing, blocked: Callable[[], list[Declared]]
) -> list[Problem]:
    """What is wrong with a profile. The ``blocked`` plugins are asked for their sections where it
    has keys that no other plugin knows."""
    from apt_core.config import read_profile, validate

    active = {r.name for r in listing.records.values() if r.state in ("active", "dormant")}
    source = read_profile(profile)
    found = validate(source, listing.sections, active=active, available=listing.available)
    if found.unknown:
        asked = blocked()
        listing.available += [section for declared in asked for section in declared.sections]
        broken = any(record.state == "broken" for record in listing.records.values())
        found = validate(
            source,
            listing.sections,
            active=active,
            available=listing.available,
            lenient=broken or any(declared.problem for declared in asked),
        )
    return found.problems


def _read(profile: str) -> tuple[Mapping[str, Any], Path | None, set[str]]:
    """A profile, the folder of its plugins, and those that its schedule enables later."""
    # Reading profiles takes pydantic, which takes as long to import as all of a plain listing.
    from apt_core.config import read_profile
    from apt_core.schedules import Schedule

    source = read_profile(profile)
    later = set()
    with suppress(ConfigError):
        schedule = Schedule(source.data)
        later = {
            boundary.plugin
            for boundary in schedule.boundaries()
            if not schedule.should_enable_plugin(boundary.plugin, epoch=1, step=1, tokens=0)
        }
    return source.data, source.folder_of(("plugins",)), later


def implementation_rows(listing: Listing, hook: str | None = None) -> list[dict[str, Any]]:
    """``{hook, plugin, priority, position, wrapper, background, file, line}`` in effective
    order."""
    rows = []
    for name in [hook] if hook else POLICIES:
        for position, call in enumerate(listing.manager.order(name, dormant=True), start=1):
            file, line = source_of(call.function)
            rows.append(
                {
                    "hook": name,
                    "plugin": call.plugin,
                    "priority": call.priority,
                    "position": position,
                    "wrapper": call.wrapper,
                    "background": bool((options_of(call.function) or {}).get("background")),
                    "file": short_path(file),
                    "line": line,
                }
            )
    return rows


def hook_facts(name: str) -> dict[str, Any]:
    """Signature, behaviour, policy and contract of one hook."""
    specification, policy = getattr(hookspecs, name), POLICIES[name]
    return {
        "hook": name,
        "signature": f"{name}({', '.join(inspect.signature(specification).parameters)})",
        **{part.name: getattr(policy, part.name) for part in fields(policy)},
        "stage": policy.stage.name.lower(),
        "returns": (inspect.getdoc(policy.returns) or "").partition("\n")[0],
        "doc": inspect.getdoc(specification) or "",
    }


def plugin_rows(listing: Listing) -> list[dict[str, Any]]:
    """``{name, dist, version, state, priority, failures, load_ms, summary}``."""
    names = (
        "name", "dist", "version", "state", "priority", "failures", "load_ms", "summary",
    )  # fmt: skip
    return [listing.records[name].row(*names) for name in sorted(listing.records)]


def provider_rows(listing: Listing, kind: str | None = None) -> list[dict[str, Any]]:
    """``{kind, name, plugin, version, default, requires, usable, reason, section, settings}``;
    ``settings`` maps the keys of the section to their defaults."""
    rows = []
    for spec in listing.providers.specs(kind):
        can_be_used, reason = usable(spec)
        try:
            settings = _defaults(spec)
        except Exception as error:  # foreign code
            settings = {}
            reason = reason or f"its settings cannot be read: {one_line(error)}"
        rows.append(
            {
                "kind": spec.kind,
                "name": spec.name,
                "plugin": spec.plugin,
                "version": spec.version,
                "default": spec is listing.providers.default(spec.kind),
                "requires": list(spec.requires),
                "usable": can_be_used,
                "reason": reason,
                "section": spec.section,
                "settings": settings,
            }
        )
    return rows


def _defaults(spec: ProviderSpec) -> dict[str, Any]:
    """The defaults of a provider's settings, with masks for secrets; None where there is none."""
    if not spec.config:
        return {}
    from pydantic_core import to_jsonable_python

    from apt_core.secrets import without_secrets

    fields = resolve(spec.config).model_fields.items()
    defaults = {
        field.alias or name: None
        if field.is_required()
        else to_jsonable_python(field.get_default(call_default_factory=True), fallback=str)
        for name, field in fields
    }
    masked: dict[str, Any] = without_secrets(defaults)
    return masked


def provider_settings(spec: ProviderSpec) -> Sequence[KeyFacts]:
    """The settings of a provider, with their defaults. Raises what resolving their model does."""
    from apt_core.config import describe_settings

    model = resolve(spec.config) if spec.config else None
    return describe_settings(model, spec.section) if model else ()
