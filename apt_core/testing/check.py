"""``check_plugin``: does a plugin load, declare, build, train, and leave others alone?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from apt_core.declarations import declared_by
from apt_core.discovery import installed_plugins
from apt_core.errors import AptError, did_you_mean
from apt_core.failures import one_line
from apt_core.kernel import NAME_KEYS
from apt_core.plugin_manager import PluginManager
from apt_core.registry import Registry
from apt_core.testing.tiny import tiny_run
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


def check_plugin(reference: str | os.PathLike[str]) -> list[Finding]:
    """Check the plugin behind a name, a dotted module or a ``.py`` path; never raises for it.

    ``core`` stands for the providers of the core, and ``attention:mha`` for one of them.
    """
    reference = os.fspath(reference)
    if reference == CORE or any(reference.startswith(f"{kind}:") for kind in KINDS):
        return _check_core(reference)
    manager = PluginManager()
    declared = declared_by(reference, installed_plugins(), manager)
    if declared.problem is not None:
        return [Finding("loads", False, str(declared.problem))]
    findings = [Finding("loads", True, f"plugin {declared.record.name}")]
    plugin = manager.get_plugin(declared.record.name)
    if not manager.get_hookcallers(plugin):
        findings.append(Finding("implements a hook", False, misplaced_hooks(plugin)))
    registry = Registry(manager)
    findings += [Finding("providers", False, str(problem)) for problem in registry.problems]
    for spec in registry.specs():
        if spec.plugin == declared.record.name:
            findings += _check_provider(registry, spec, reference)
    plain = tiny_run(steps=6, overrides=WHOLE)
    try:
        run = tiny_run(reference, steps=6, overrides=WHOLE)
    except Exception as error:
        return [*findings, Finding("trains", False, _reason(error))]
    findings.append(Finding("trains", True, "6 steps, strictly"))
    name = declared.record.name
    if not any(manager.implements(name, hook) for hook in ACTS):
        same = plain.same_weights(run)
        detail = "" if same else "the weights differ from a run without the plugin"
        findings.append(Finding("leaves the weights alone", same, detail))
    return findings


def _check_core(reference: str) -> list[Finding]:
    """The core's providers, or the one that is called ``reference``."""
    registry = Registry()
    specs = [spec for spec in registry.specs() if reference in (CORE, spec.key)]
    if not specs:
        keys = [spec.key for spec in registry.specs(reference.partition(":")[0])]
        hint = did_you_mean(reference, keys) or f"there are {', '.join(keys) or 'none'}"
        detail = f"the core has no such provider ({hint}); of a plugin, give the plugin's name"
        return [Finding(reference, False, detail)]
    return [finding for spec in specs for finding in _check_provider(registry, spec)]


def _check_provider(registry: Registry, spec: ProviderSpec, *plugins: str) -> Iterator[Finding]:
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
    if spec.kind in TRAINED_WITH:
        try:
            tiny_run(*plugins, steps=2, overrides={NAME_KEYS[spec.kind]: spec.name})
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
