"""``check_plugin``: does a plugin load, declare, build, train, and leave others alone?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from apt_core.declarations import declared_by
from apt_core.discovery import installed_plugins
from apt_core.errors import AptError
from apt_core.failures import one_line
from apt_core.kernel import NAME_KEYS
from apt_core.plugin_manager import PluginManager
from apt_core.registry import Registry
from apt_core.testing.tiny import tiny_run
from apt_core.types import ProviderSpec
from apt_core.validation import misplaced_hooks

ACTS = ("apt_loss_terms", "apt_param_groups", "apt_build_provider", "on_backward_end")
"""Hooks by which a plugin may mean to change the weights."""

TRAINED_WITH = ("attention", "ffn", "norm", "position", "optimizer", "lr_schedule")
"""Kinds of providers that a tiny run can be made with, whatever their settings are."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked; ``detail`` says why it failed, or what was left out."""

    check: str
    ok: bool
    detail: str = ""


def check_plugin(reference: str | os.PathLike[str]) -> list[Finding]:
    """Check the plugin behind a name, a dotted module or a ``.py`` path; never raises for it."""
    reference = os.fspath(reference)
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
    plain = tiny_run(steps=6)
    try:
        run = tiny_run(reference, steps=6)
    except Exception as error:
        detail = str(error) if isinstance(error, AptError) else one_line(error)
        return [*findings, Finding("trains", False, detail)]
    findings.append(Finding("trains", True, "6 steps, strictly"))
    name = declared.record.name
    if not any(manager.implements(name, hook) for hook in ACTS):
        same = plain.same_weights(run)
        detail = "" if same else "the weights differ from a run without the plugin"
        findings.append(Finding("leaves the weights alone", same, detail))
    return findings


def _check_provider(registry: Registry, spec: ProviderSpec, reference: str) -> Iterator[Finding]:
    usable, reason = registry.usable(spec)
    if usable is False:
        yield Finding(spec.key, True, f"left out: {reason}")
        return
    try:
        provider: Any = registry.get(spec.kind, spec.name, fallback=False)
    except AptError as error:
        yield Finding(spec.key, False, str(error))
        return
    yield Finding(spec.key, True, "built")
    from apt_core.testing.conformance import CHECKS

    for check, run in CHECKS[spec.kind](provider) if spec.kind in CHECKS else ():
        try:
            run()
        except Exception as error:
            yield Finding(f"{spec.key}, {check}", False, one_line(error))
        else:
            yield Finding(f"{spec.key}, {check}", True)
    if spec.kind in TRAINED_WITH:
        try:
            tiny_run(reference, steps=2, overrides={NAME_KEYS[spec.kind]: spec.name})
        except Exception as error:
            yield Finding(f"{spec.key}, trains", False, one_line(error))
        else:
            yield Finding(f"{spec.key}, trains", True, "2 steps")
