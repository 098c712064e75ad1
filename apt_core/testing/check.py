"""``check_plugin``: does a plugin load, declare, build, train, and leave others alone?"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apt_core.config import Config, Override
from apt_core.declarations import declared_by
from apt_core.discovery import installed_plugins
from apt_core.errors import AptError, did_you_mean
from apt_core.failures import one_line
from apt_core.kernel import NAME_KEYS, boot
from apt_core.plugin_manager import PluginManager
from apt_core.registry import Registry
from apt_core.testing.tiny import TINY_PROFILE, tiny_run
from apt_core.types import CORE, KINDS, ProviderSpec
from apt_core.validation import misplaced_hooks

ACTS = (
    "apt_loss_terms",
    "apt_param_groups",
    "apt_build_provider",
    "apt_transform_model",
    "on_backward_end",
)
"""Hooks by which a plugin may mean to change the weights."""

TRAINED_WITH = ("attention", "ffn", "norm", "position", "backbone", "optimizer", "lr_schedule")
"""Kinds of providers that a tiny run can be made with, whatever their settings are."""


WHOLE = {"model.tva.s": 1}
"""What the tiny model has besides for a plugin: the compensator, whose vein one may look at."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked; ``detail`` says why it failed, or was ``left_out``."""

    check: str
    ok: bool
    detail: str = ""
    left_out: bool = False

    @property
    def result(self) -> str:
        """In a word or two, as a table shows it."""
        return "FAILED" if not self.ok else "left out" if self.left_out else "ok"


def check_plugin(
    reference: str | os.PathLike[str],
    *,
    profile: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | Sequence[Override] = (),
) -> list[Finding]:
    """Check the plugin behind a name, a dotted module or a ``.py`` path; never raises for it.

    ``core`` stands for the providers of the core, and ``attention:mha`` for one of them. Providers
    have the settings that ``profile`` gives them, or their defaults, and ``overrides``, by dotted
    key. Raises ConfigError where these are no settings.
    """
    reference = os.fspath(reference)
    if not isinstance(overrides, Sequence):
        overrides = [Override(tuple(k.split(".")), v, k) for k, v in overrides.items()]
    if reference == CORE or any(reference.startswith(f"{kind}:") for kind in KINDS):
        return _check_core(reference, _settings((), profile, overrides))
    manager = PluginManager()
    declared = declared_by(reference, installed_plugins(), manager)
    if declared.problem is not None:
        return [Finding("loads", False, str(declared.problem))]
    findings = [Finding("loads", True, f"plugin {declared.record.name}")]
    plugin = manager.get_plugin(declared.record.name)
    if not manager.get_hookcallers(plugin):
        findings.append(Finding("implements a hook", False, misplaced_hooks(plugin)))
    given = _settings([reference], profile, overrides)
    registry = Registry(manager)
    registry.profile = given
    findings += [Finding("providers", False, str(problem)) for problem in registry.problems]
    for spec in registry.specs():
        if spec.plugin == declared.record.name:
            findings += _check_provider(registry, spec, overrides, reference)
    sections = {s.path for s in declared.sections} | {s.section for s in declared.providers}
    sections -= {""}
    own = _of_sections(given, sections)
    beginnings = tuple(f"{path}." for path in sections)
    shared = {o.key: o.value for o in overrides if not f"{o.key}.".startswith(beginnings)}
    plain = tiny_run(steps=6, overrides=WHOLE | shared)
    try:
        run = tiny_run(reference, steps=6, overrides=WHOLE | shared | own)
    except Exception as error:
        return [*findings, Finding("trains", False, _reason(error))]
    findings.append(Finding("trains", True, "6 steps, strictly"))
    name = declared.record.name
    if not any(manager.implements(name, hook) for hook in ACTS):
        same = plain.same_weights(run)
        detail = "" if same else "the weights differ from a run without the plugin"
        findings.append(Finding("leaves the weights alone", same, detail))
    return findings


def _settings(
    plugins: Sequence[str],
    profile: str | os.PathLike[str] | Mapping[str, Any] | None,
    overrides: Sequence[Override],
) -> Config | None:
    """The profile with ``overrides``, checked; None where there are neither."""
    if profile is None and not overrides:
        return None
    if isinstance(profile, os.PathLike):
        profile = os.fspath(profile)
    given = TINY_PROFILE if profile is None else profile
    return boot(given, plugins=plugins, overrides=overrides, files=False).config


def _of_sections(config: Config | None, sections: Iterable[str]) -> dict[str, Any]:
    """What a checked profile has in some sections, as overrides."""
    found = {path: config.section(path) for path in sections} if config else {}
    return {path: value.model_dump() for path, value in found.items() if value is not None}


def _check_core(reference: str, given: Config | None) -> list[Finding]:
    """The core's providers, or the one that is called ``reference``."""
    registry = Registry()
    registry.profile = given
    specs = [spec for spec in registry.specs() if reference in (CORE, spec.key)]
    if not specs:
        keys = [spec.key for spec in registry.specs(reference.partition(":")[0])]
        hint = did_you_mean(reference, keys) or f"there are {', '.join(keys) or 'none'}"
        detail = f"the core has no such provider ({hint}); of a plugin, give the plugin's name"
        return [Finding(reference, False, detail)]
    return [finding for spec in specs for finding in _check_provider(registry, spec, ())]


def _check_provider(
    registry: Registry, spec: ProviderSpec, overrides: Sequence[Override], *plugins: str
) -> Iterator[Finding]:
    usable, reason = registry.usable(spec)
    if usable is False:
        yield Finding(spec.key, True, reason, left_out=True)
        return
    try:
        provider: Any = registry.get(spec.kind, spec.name, fallback=False)
    except AptError as error:
        yield Finding(spec.key, False, str(error))
        return
    from apt_core.testing.conformance import LeftOut, checks_of
    from apt_core.testing.conformance.lengths import integers, too_large

    checks = checks_of(spec.kind, provider)
    if not checks:
        detail = f"there are no checks of what a provider of kind {spec.kind} does"
        yield Finding(f"{spec.key}, behaviour", True, detail, left_out=True)
    for check in checks:
        name = f"{spec.key}, {check.name}"
        try:
            check.run()
        except LeftOut as why:
            yield Finding(name, True, str(why), left_out=True)
        except Exception as error:
            yield Finding(name, False, _reason(error))
            if check is checks[0]:
                return
        else:
            yield Finding(name, True)
    if names := too_large(integers(provider)):
        detail = f"no text was longer than {names}: give a smaller one with --set"
        yield Finding(f"{spec.key}, long settings", True, detail, left_out=True)
    if spec.kind in TRAINED_WITH:
        settings = {o.key: o.value for o in overrides}
        settings |= _of_sections(registry.profile, {spec.section} - {""})
        settings[NAME_KEYS[spec.kind]] = spec.name
        try:
            tiny_run(*plugins, steps=2, overrides=settings)
        except Exception as error:
            yield Finding(f"{spec.key}, trains", False, _reason(error))
        else:
            yield Finding(f"{spec.key}, trains", True, "2 steps")


def _reason(error: Exception) -> str:
    """Of errors with a message for the person, that message alone."""
    line = one_line(error)
    if isinstance(error, AssertionError):
        return line.removeprefix("AssertionError: ")
    return str(error) if isinstance(error, AptError) else line
