"""``check_plugin`` checks that a plugin loads, declares, builds, trains and leaves others alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_core.catalogue import usable
from apt_core.config import Config, Override
from apt_core.declarations import declared_by
from apt_core.discovery import installed_plugins
from apt_core.error_text import one_line
from apt_core.errors import AptError, did_you_mean
from apt_core.kernel import boot
from apt_core.kinds import KINDS
from apt_core.plugin_checks import misplaced_hooks
from apt_core.plugin_manager import PluginManager
from apt_core.plugin_objects import CLASS
from apt_core.registry import Registry
from apt_core.testing.module_state import KeptInModules
from apt_core.testing.own_modules import modules_of, own_modules
from apt_core.testing.tiny import TINY_PROFILE, tiny_run
from apt_core.testing.two_processes import differences
from apt_core.types import CORE, ProviderSpec

TRAINED_WITH = ("attention", "ffn", "norm", "position", "backbone", "optimizer", "lr_schedule")
"""Kinds of providers with which a tiny run can be made for any settings."""


COMPENSATOR = {"model.tva.s": 1}
"""What the tiny model has besides for a plugin, if it has TVA: one may look at its vein."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked; ``detail`` says why it failed, was ``left_out``, or is a
    ``warning``: it works, and may be wrong in some uses."""

    check: str
    ok: bool
    detail: str = ""
    left_out: bool = False
    warning: bool = False

    @property
    def result(self) -> str:
        """The result in a word or two, for a table."""
        if not self.ok:
            return "FAILED"
        return "left out" if self.left_out else "warning" if self.warning else "ok"


def check_plugin(
    reference: str | os.PathLike[str],
    *,
    profile: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | Sequence[Override] = (),
    processes: int = 1,
) -> list[Finding]:
    """Check the plugin behind a name, a dotted module or a ``.py`` path; never raises for it.

    ``core`` stands for the providers of the core, and ``attention:mha`` for one of them. Providers
    have the settings that ``profile`` gives them, or their defaults, and ``overrides``, by dotted
    key. With two ``processes``, what the plugin does to training is tried in two as well, under DDP
    and FSDP2, which takes some seconds. Raises ConfigError where these are no settings.
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
    findings += [Finding("providers", False, str(problem)) for problem in registry.known.problems]
    for spec in registry.known.specs():
        if spec.plugin == declared.record.name:
            findings += _check_provider(registry, spec, overrides, reference)
    sections = {s.path for s in declared.sections} | {s.section for s in declared.providers}
    sections -= {""}
    own = _of_sections(given, sections)
    beginnings = tuple(f"{path}." for path in sections)
    shared = {o.key: o.value for o in overrides if not f"{o.key}.".startswith(beginnings)}
    of_tva = not any(key.startswith("model.attention_") for key in shared)
    whole = {**(COMPENSATOR if of_tva else {}), **shared}
    plain = tiny_run(steps=6, overrides=whole)
    try:
        run = tiny_run(reference, steps=6, overrides=whole | own)
    except Exception as error:
        return [*findings, Finding("trains", False, _reason(error))]
    findings.append(Finding("trains", True, "6 steps, strictly"))
    name = declared.record.name
    if not manager.implements_where(name, lambda policy: policy.trains):
        same = plain.same_weights(run)
        detail = "" if same else "the weights differ from a run without the plugin"
        findings.append(Finding("leaves the weights alone", same, detail))
    # Weights that a plugin changes in secret would be told twice.
    if findings[-1].ok:
        kept = KeptInModules(lambda: modules_of(reference))
        wrong = _resumed(reference, name, whole | own, kept)
        if wrong or manager.implements(name, "apt_state_dict"):
            findings.append(Finding("resumes", not wrong, wrong))
        if kept.names:
            findings.append(Finding("state in modules", True, _kept(kept.names), warning=True))
    if processes > 1:
        settings = {**shared, **own}
        findings += _in_two_processes(reference, name, registry, manager, settings, whole | own)
    return findings


def _kept(names: Iterable[str]) -> str:
    return (
        f"a run changes {', '.join(names)}, which all runs of a process share: keep it on self, in "
        f"a class that the module calls {CLASS}, or behind functools.cache if it depends on the "
        "arguments alone"
    )


def _resumed(
    reference: str, name: str, overrides: Mapping[str, Any], observer: KeptInModules
) -> str:
    """The difference between a resumed run with the plugin and an uninterrupted one, in which
    ``observer`` is in; the plugin has only what it has handed over."""
    from apt_core.runs.compare import compare_runs

    with tempfile.TemporaryDirectory(prefix="apt-check-") as temporary:
        folders = [Path(temporary) / part for part in ("whole", "part")]
        options: dict[str, Any] = {"steps": 6, "overrides": overrides}
        # Each as in a process of its own: earlier runs have left their state in modules.
        with own_modules([reference], anew=True):
            whole = tiny_run(reference, observer, output=folders[0], **options)
        with own_modules([reference], anew=True):
            tiny_run(reference, output=folders[1], stop_at_step=3, **options)
        try:
            resumed = tiny_run(reference, output=folders[1], resume=True, **options)
        except Exception as error:
            return _reason(error)
        if not resumed.same_weights(whole):
            return "a run that is resumed after step 3 has other weights after step 6"
        found = compare_runs(*folders, names=("in one go", "resumed")).differences
    told = [str(d) for d in found if d.what.startswith(("plugins: ", "the state of plugin "))]
    text = "a run that is resumed after step 3 hands over another state after step 6"
    return f"{text}: {'; '.join(told[:3])}" if told else ""


def _in_two_processes(
    reference: str,
    name: str,
    registry: Registry,
    manager: PluginManager,
    settings: Mapping[str, Any],
    whole: Mapping[str, Any],
) -> Iterator[Finding]:
    """Findings in two processes: for each provider that trains with ``settings``, or for a plugin
    with hooks with those of the ``whole`` tiny model."""
    specs = [s for s in registry.known.specs() if s.plugin == name and s.kind in TRAINED_WITH]
    specs = [spec for spec in specs if usable(spec)[0] is not False]
    tried: dict[str, dict[str, Any]] = {
        spec.key: {**settings, KINDS[spec.kind].keys[0]: spec.name} for spec in specs
    }
    if not tried and manager.implements_where(name, lambda policy: policy.trains):
        tried[""] = dict(whole)
    for key, overrides in tried.items():
        for sharding, wrong in differences([reference], overrides).items():
            what = f"two processes, {sharding}"
            yield Finding(f"{key}, {what}" if key else what, not wrong, wrong or "as one does")


def _settings(
    plugins: Sequence[str],
    profile: str | os.PathLike[str] | Mapping[str, Any] | None,
    overrides: Sequence[Override],
) -> Config | None:
    """The validated ``profile`` with ``overrides``; None without either."""
    if profile is None and not overrides:
        return None
    if isinstance(profile, os.PathLike):
        profile = os.fspath(profile)
    given = TINY_PROFILE if profile is None else profile
    return boot(given, plugins=plugins, overrides=overrides, files=False).config


def _of_sections(config: Config | None, sections: Iterable[str]) -> dict[str, Any]:
    """The values of some sections of a validated profile, as overrides."""
    found = {path: config.section(path) for path in sections} if config else {}
    return {path: value.model_dump() for path, value in found.items() if value is not None}


def _check_core(reference: str, given: Config | None) -> list[Finding]:
    """The core's providers, or the one that is called ``reference``."""
    registry = Registry()
    registry.profile = given
    specs = [spec for spec in registry.known.specs() if reference in (CORE, spec.key)]
    if not specs:
        keys = [spec.key for spec in registry.known.specs(reference.partition(":")[0])]
        hint = did_you_mean(reference, keys) or f"there are {', '.join(keys) or 'none'}"
        detail = f"the core has no such provider ({hint}); of a plugin, give the plugin's name"
        return [Finding(reference, False, detail)]
    return [finding for spec in specs for finding in _check_provider(registry, spec, ())]


def _check_provider(
    registry: Registry, spec: ProviderSpec, overrides: Sequence[Override], *plugins: str
) -> Iterator[Finding]:
    can_be_used, reason = usable(spec)
    if can_be_used is False:
        yield Finding(spec.key, True, reason, left_out=True)
        return
    try:
        provider: Any = registry.get(spec.kind, spec.name, fallback=False)
    except AptError as error:
        # One of the core that cannot be built from the defaults needs a file.
        needs = spec.plugin == CORE and registry.profile is None
        yield Finding(spec.key, needs, str(error), left_out=needs)
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
        settings[KINDS[spec.kind].keys[0]] = spec.name
        try:
            tiny_run(*plugins, steps=2, overrides=settings)
        except Exception as error:
            yield Finding(f"{spec.key}, trains", False, _reason(error))
        else:
            yield Finding(f"{spec.key}, trains", True, "2 steps")


def _reason(error: Exception) -> str:
    """The message of an AptError alone, otherwise type and message."""
    line = one_line(error)
    if isinstance(error, AssertionError):
        return line.removeprefix("AssertionError: ")
    return str(error) if isinstance(error, AptError) else line
