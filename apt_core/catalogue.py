"""Which providers there are: who declares each, which is the default of its kind, what replaces it.

Nothing here builds a provider or calls a plugin: that is the registry's.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from apt_core import __version__
from apt_core.defaults import core_providers
from apt_core.errors import ConfigError, Problem, did_you_mean
from apt_core.kinds import KINDS
from apt_core.requirements import unmet
from apt_core.synonyms import value_meant
from apt_core.types import CORE, ProviderSpec

Pair = tuple[str, str]
"""Kind and name of a provider."""


class Catalogue:
    """The core's providers and those that plugins ``declared``, by kind and name.

    ``blocked`` are providers of blocked plugins, each with the reason: they are
    known, so that asking for one is no mistake, and cannot be used. ``problems`` are the specs that
    could not be taken, such as a name that two plugins declare.
    """

    def __init__(
        self,
        declared: Iterable[tuple[str, Sequence[ProviderSpec]]] = (),
        blocked: Iterable[tuple[ProviderSpec, str]] = (),
    ) -> None:
        self._specs: dict[Pair, ProviderSpec] = {
            (spec.kind, spec.name): spec for spec in core_providers(__version__)
        }
        self.problems: list[Problem] = []
        for plugin, specs in declared:
            for spec in specs:
                problem = self.check_spec(plugin, spec)
                if problem:
                    self.problems.append(problem)
                else:
                    section = spec.section or KINDS[spec.kind].section
                    stamped = replace(spec, plugin=plugin, section=section)
                    self._specs[spec.kind, spec.name] = stamped
        self._blocked: dict[Pair, tuple[ProviderSpec, str]] = {
            (spec.kind, spec.name): (replace(spec, config=None), reason)
            for spec, reason in blocked
            if (spec.kind, spec.name) not in self._specs
        }

    def check_spec(self, plugin: str, spec: ProviderSpec) -> Problem | None:
        """The problem of adding this provider, or None."""
        key = f"plugin {plugin}"
        if spec.kind not in KINDS:
            hint = did_you_mean(spec.kind, KINDS) or f"kinds are {', '.join(KINDS)}"
            return Problem(f"{spec.key} has an unknown kind", key=key, hint=hint)
        other = self._specs.get((spec.kind, spec.name))
        if other is not None:
            return Problem(
                f"provider {spec.key} is registered by both {other.plugin!r} and {plugin!r}",
                key=key,
                hint=f"rename one of them, or leave one plugin out: --plugin no:{plugin}",
            )
        return None

    # Looking up ------------------------------------------------------------------------------

    def __contains__(self, pair: Pair) -> bool:
        return pair in self._specs or pair in self._blocked

    def blocked_because(self, spec: ProviderSpec) -> str:
        """The reason why a known provider is blocked, or an empty string."""
        _, reason = self._blocked.get((spec.kind, spec.name), (spec, ""))
        return reason

    def specs(self, kind: str | None = None) -> list[ProviderSpec]:
        """The specs that can be used, by kind in the order of KINDS, the default first."""
        chosen = [spec for spec in self._specs.values() if kind in (None, spec.kind)]
        order = list(KINDS)
        return sorted(chosen, key=lambda s: (order.index(s.kind), not s.default, s.name))

    def list_providers(self, kind: str | None = None) -> dict[str, list[str]]:
        """Provider names by kind. Raises ConfigError for a kind that there is not."""
        if kind is not None and kind not in KINDS:
            raise ConfigError(f"there is no kind {kind!r}", hint=did_you_mean(kind, KINDS))
        listed: dict[str, list[str]] = {}
        for spec in self.specs(kind):
            listed.setdefault(spec.kind, []).append(spec.name)
        return listed

    def spec(self, kind: str, name: str) -> ProviderSpec:
        """The spec of a known provider; ConfigError with a suggestion for any other."""
        problem = self.check_name(kind, name)
        if problem:
            raise ConfigError(problem)
        return self._specs.get((kind, name)) or self._blocked[kind, name][0]

    def default(self, kind: str) -> ProviderSpec | None:
        """The kind's default: a plugin's if one declares it, else the core's."""
        return next(iter(self._defaults(kind)), None)

    def replacement(self, spec: ProviderSpec) -> ProviderSpec | None:
        """The provider that replaces an unusable ``spec``; None if the kind has no fallback."""
        if not KINDS[spec.kind].fallback:
            return None
        return next((other for other in self._defaults(spec.kind) if other.name != spec.name), None)

    def _defaults(self, kind: str) -> list[ProviderSpec]:
        defaults = [spec for spec in self.specs(kind) if spec.default]
        return sorted(defaults, key=lambda spec: spec.plugin == CORE)

    # Judging ---------------------------------------------------------------------------------

    def check_name(self, kind: str, name: str, **place: str) -> Problem | None:
        """The problem of asking for this provider, or None."""
        if (kind, name) in self:
            return None
        if kind not in KINDS:
            return Problem(f"there is no kind {kind!r}", hint=did_you_mean(kind, KINDS), **place)
        names = [spec.name for spec in self.specs(kind)] + ["none"] * KINDS[kind].optional
        meant = value_meant(kind, name)
        # Naming one of an installed plugin that is not active yet activates it.
        hint = f"did you mean {meant!r}?" if meant else did_you_mean(name, names)
        hint = hint or f"there are: {', '.join(names) or 'none'}"
        return Problem(f"no plugin offers {kind} provider {name!r}", hint=hint, **place)

    def check_conflicts(self, keys: Iterable[str]) -> list[Problem]:
        """Conflicts among providers given as ``kind:name``, each pair once."""
        asked = set(keys)
        chosen = [spec for spec in self._specs.values() if spec.key in asked]
        conflicts = {
            tuple(sorted((spec.key, other.key)))
            for spec in chosen
            for other in chosen
            if other is not spec and other.key in spec.conflicts
        }
        return [
            Problem(f"providers {first} and {second} conflict", hint="choose one of them")
            for first, second in sorted(conflicts)
        ]

    def get_info(self, kind: str, name: str) -> dict[str, Any]:
        """Everything about one provider, as ``apt-hooks info --json`` prints it."""
        spec = self.spec(kind, name)
        model = resolve(spec.config) if spec.config else None
        return {
            "kind": spec.kind,
            "name": spec.name,
            "version": spec.version,
            "plugin": spec.plugin,
            "dependencies": list(spec.requires),
            "is_default": spec is self.default(kind),
            "conflicts": list(spec.conflicts),
            "summary": spec.summary,
            "config": {
                "section": spec.section,
                "schema": model.model_json_schema() if model else {},
            },
        }


def usable(spec: ProviderSpec) -> tuple[bool | None, str]:
    """Whether the provider can be used here, and why not; None where that takes torch to know."""
    missing = unmet(spec.requires)
    if missing:
        return False, "; ".join(missing)
    return (True, "") if spec.plugin == CORE else (None, "")


def resolve(target: Any) -> Any:
    """The object behind ``"module:attribute"``; anything else is returned as it is."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
