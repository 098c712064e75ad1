"""The provider registry, derived from what ``apt_register_providers`` returned.

A profile selects a provider by kind and name, never by priority. A provider that is registered but
cannot be used here falls back to its kind's default, with the reason; a name that nobody registers
is bad input.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import WARNING
from typing import Any

from apt_core import __version__
from apt_core.defaults import core_providers
from apt_core.error_text import one_line
from apt_core.errors import (
    AptError,
    ConfigError,
    PluginError,
    Problem,
    ProviderError,
    did_you_mean,
)
from apt_core.hook_returns import check_provider
from apt_core.kinds import KINDS
from apt_core.log import get_logger
from apt_core.markers import hookimpl
from apt_core.plugin_manager import PluginManager
from apt_core.requirements import unmet
from apt_core.synonyms import value_meant
from apt_core.types import CORE, FallbackEvent, ProviderSpec

log = get_logger("apt.registry")

Probe = Callable[[ProviderSpec, Any, Any], "str | None"]
"""``probe(spec, provider, config)``: None if the provider works here, else the reason."""


@dataclass(frozen=True)
class Resolution:
    """What was asked for, what is used, and why they differ (an empty reason: they do not)."""

    kind: str
    asked: str
    used: str
    reason: str = ""

    def row(self) -> dict[str, str]:
        """As the manifest shows it."""
        return {"kind": self.kind, "asked": self.asked, "used": self.used, "reason": self.reason}


class Registry:
    """Providers by kind and name.

    ``profile`` is the validated config: a provider's settings are its ``section`` there. ``probe``
    tries a provider before it is used; without one every provider that can be built is taken.
    ``problems`` are the specs that could not be taken, such as a name that two plugins register.
    """

    def __init__(
        self,
        manager: PluginManager | None = None,
        *,
        profile: Any = None,
        probe: Probe | None = None,
        strict: bool = False,
    ) -> None:
        self.manager = manager or PluginManager()
        self.profile = profile
        self.probe = probe
        self.strict = strict
        self.resolutions: dict[tuple[str, str], Resolution] = {}
        self._specs: dict[tuple[str, str], ProviderSpec] = {}
        self._blocked: dict[tuple[str, str], tuple[ProviderSpec, str]] = {}
        self._built: dict[tuple[str, str, Any], Any] = {}
        self.problems: list[Problem] = []
        self.refresh()

    # Declaring -------------------------------------------------------------------------------

    def refresh(self) -> list[Problem]:
        """Derive the registry anew from the plugins; returns (and keeps) what is wrong."""
        specs = {(spec.kind, spec.name): spec for spec in core_providers(__version__)}
        problems = []
        for plugin, declared in self.manager.call_each("apt_register_providers"):
            for spec in declared:
                problem = self._check_spec(plugin, spec, specs)
                if problem:
                    problems.append(problem)
                else:
                    section = spec.section or KINDS[spec.kind].section
                    specs[spec.kind, spec.name] = replace(spec, plugin=plugin, section=section)
        self._specs, self.problems = specs, problems
        return problems

    def _check_spec(
        self, plugin: str, spec: ProviderSpec, specs: Mapping[tuple[str, str], ProviderSpec]
    ) -> Problem | None:
        key = f"plugin {plugin}"
        if spec.kind not in KINDS:
            hint = did_you_mean(spec.kind, KINDS) or f"kinds are {', '.join(KINDS)}"
            return Problem(f"{spec.key} has an unknown kind", key=key, hint=hint)
        other = specs.get((spec.kind, spec.name))
        if other is not None:
            return Problem(
                f"provider {spec.key} is registered by both {other.plugin!r} and {plugin!r}",
                key=key,
                hint=f"rename one of them, or leave one plugin out: --plugin no:{plugin}",
            )
        return None

    def register(
        self,
        kind: str,
        name: str,
        cls: Callable[..., Any] | str,
        default: bool = False,
        excludes: Sequence[str] = (),
    ) -> None:
        """Register one provider from a script; the same class again changes nothing.

        Raises ConfigError when the name is taken by another class, TypeError for what can build
        nothing.
        """
        if not callable(cls) and not isinstance(cls, str):
            raise TypeError(f"a provider is a class or 'module:attribute', not {cls!r}")
        existing = self._specs.get((kind, name))
        if existing is not None and existing.factory is cls:
            return
        spec = ProviderSpec(
            kind,
            name,
            cls,
            version=str(_told_by(cls, "get_version", "")),
            requires=tuple(_told_by(cls, "get_dependencies", ())),
            conflicts=tuple(excludes),
            default=default,
        )
        plugin_name = f"script:{kind}:{name}"
        problem = self._check_spec(plugin_name, spec, self._specs)
        if problem:
            raise ConfigError(problem)
        self.manager.register(_OneSpec(spec), plugin_name)
        self.refresh()

    def note_blocked(self, spec: ProviderSpec, reason: str) -> None:
        """Know a provider of a plugin that is not active: asking for it falls back."""
        self._blocked[spec.kind, spec.name] = (replace(spec, config=None), reason)

    # Looking ---------------------------------------------------------------------------------

    def specs(self, kind: str | None = None) -> list[ProviderSpec]:
        """Every spec, by kind in the order of KINDS, the default first."""
        chosen = [spec for spec in self._specs.values() if kind in (None, spec.kind)]
        order = list(KINDS)
        return sorted(chosen, key=lambda s: (order.index(s.kind), not s.default, s.name))

    def list_providers(self, kind: str | None = None) -> dict[str, list[str]]:
        """Provider names by kind. Raises ConfigError for a kind that there is not."""
        if kind is not None and kind not in KINDS:
            raise ConfigError(Problem(f"there is no kind {kind!r}", hint=did_you_mean(kind, KINDS)))
        listed: dict[str, list[str]] = {}
        for spec in self.specs(kind):
            listed.setdefault(spec.kind, []).append(spec.name)
        return listed

    def has(self, kind: str, name: str) -> bool:
        return (kind, name) in self._specs or (kind, name) in self._blocked

    def knows(self, kind: str, name: str) -> bool:
        """Is the provider that of an active plugin, or the core's?"""
        return (kind, name) in self._specs

    def default(self, kind: str) -> ProviderSpec | None:
        """The kind's default: a plugin's if one declares it, else the core's."""
        return next(iter(self._defaults(kind)), None)

    def _defaults(self, kind: str) -> list[ProviderSpec]:
        defaults = [spec for spec in self.specs(kind) if spec.default]
        return sorted(defaults, key=lambda spec: spec.plugin == CORE)

    def spec(self, kind: str, name: str) -> ProviderSpec:
        """The spec of a registered provider; ConfigError with a suggestion for any other."""
        problem = self.check_name(kind, name)
        if problem:
            raise ConfigError(problem)
        return self._specs.get((kind, name)) or self._blocked[kind, name][0]

    def check_name(self, kind: str, name: str, **place: str) -> Problem | None:
        """What is wrong with asking for this provider, if anything."""
        if self.has(kind, name):
            return None
        if kind not in KINDS:
            return Problem(f"there is no kind {kind!r}", hint=did_you_mean(kind, KINDS), **place)
        names = [spec.name for spec in self.specs(kind)] + ["none"] * KINDS[kind].optional
        meant = value_meant(kind, name)
        # Naming one of an installed plugin that is not active yet activates it.
        hint = f"did you mean {meant!r}?" if meant else did_you_mean(name, names)
        hint = hint or f"there are: {', '.join(names) or 'none'}"
        return Problem(f"no plugin offers {kind} provider {name!r}", hint=hint, **place)

    def usable(self, spec: ProviderSpec) -> tuple[bool | None, str]:
        """Can the provider be used here, as far as can be told without torch (None: no telling)."""
        missing = unmet(spec.requires)
        if missing:
            return False, "; ".join(missing)
        return (True, "") if spec.plugin == CORE else (None, "")

    def get_info(self, kind: str, name: str) -> dict[str, Any]:
        """Everything about one provider, as ``apt-hooks info --json`` prints it."""
        spec = self.spec(kind, name)
        model = _resolve(spec.config) if spec.config else None
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

    def check_conflicts(self, keys: Iterable[str]) -> list[Problem]:
        """Conflicts among providers given as ``kind:name``, each pair once."""
        chosen = [self._specs[pair] for pair in (tuple(k.split(":", 1)) for k in keys)
                  if pair in self._specs]  # fmt: skip
        pairs = {
            tuple(sorted((spec.key, other.key)))
            for spec in chosen
            for other in chosen
            if other is not spec and other.key in spec.conflicts
        }
        return [
            Problem(f"providers {first} and {second} conflict", hint="choose one of them")
            for first, second in sorted(pairs)
        ]

    # Getting ---------------------------------------------------------------------------------

    def get(
        self, kind: str, name: str | None = None, config: Any = None, fallback: bool = True
    ) -> Any:
        """The provider of this kind and name, built with ``config``.

        Without ``config`` the provider's section of the profile is used, or its defaults. A
        provider that cannot be used here is replaced by the kind's default and the reason is
        recorded and logged; with ``fallback=False`` or ``strict`` that is an error.

        Raises ConfigError for an unknown name or an invalid config, ProviderError when the
        default itself cannot be used.
        """
        spec = self._asked(kind, name)
        settings, reason = self._settings(spec, config)
        key = (kind, spec.name, _content(settings))
        if key in self._built and (fallback or self.resolutions[kind, spec.name].used == spec.name):
            return self._built[key]
        provider = None
        if not reason:
            provider, reason = self._build(spec, settings)
        if reason:
            provider = self._fall_back(spec, settings, reason, fallback)
        else:
            self.resolutions[kind, spec.name] = Resolution(kind, spec.name, spec.name)
        self._built[key] = provider
        return provider

    def _asked(self, kind: str, name: str | None) -> ProviderSpec:
        if name is None:
            default = self.default(kind)
            if default is None:
                raise ConfigError(Problem(f"kind {kind!r} has no default provider: name one"))
            return default
        return self.spec(kind, name)

    def _fall_back(self, spec: ProviderSpec, settings: Any, reason: str, fallback: bool) -> Any:
        """The kind's default in the place of ``spec``; recorded, logged and told."""
        default = next((d for d in self._defaults(spec.kind) if d.name != spec.name), None)
        if default is None or not KINDS[spec.kind].fallback:
            raise ProviderError(f"{spec.key} (plugin {spec.plugin}) cannot be used: {reason}")
        message = f"{spec.kind}: {spec.name} not usable ({reason})"
        if self.strict or not fallback:
            because = "--strict is on" if self.strict else "fallback=False"
            raise ConfigError(
                Problem(
                    f"{message}, and no fallback is allowed: {because}",
                    hint=f"ask for {default.name}",
                )
            )
        same_section = spec.section == default.section
        given, wrong = self._settings(default, settings if same_section else None)
        provider = None
        if not wrong:
            provider, wrong = self._build(default, given)
        if wrong:
            raise ProviderError(f"{message}; nor is the default {default.name}: {wrong}")
        self.manager.events.record(
            "fell_back",
            "%s: using %s",
            message,
            default.name,
            step=self.manager.step,
            log=log,
            level=WARNING,
            provider=spec.kind,
            asked=spec.name,
            used=default.name,
            reason=reason,
        )
        self.resolutions[spec.kind, spec.name] = Resolution(
            spec.kind, spec.name, default.name, reason
        )
        self.manager.hook.on_provider_fallback(
            event=FallbackEvent(spec.kind, spec.name, default.name, reason)
        )
        return provider

    def _settings(self, spec: ProviderSpec, given: Any) -> tuple[Any, str]:
        """The provider's config, or the reason why the provider cannot be used."""
        if given is None and spec.section and self.profile is not None:
            given = self.profile.section(spec.section)
        blocked = self._blocked.get((spec.kind, spec.name))
        if blocked and (spec.kind, spec.name) not in self._specs:
            return given, blocked[1]
        missing = unmet(spec.requires)
        if missing:
            return given, "; ".join(missing)
        try:
            return self._config_for(spec, given), ""
        except BaseException as error:
            return given, self._reason(spec, error)

    def _config_for(self, spec: ProviderSpec, given: Any) -> Any:
        """The provider's config: what was given, validated, else defaults."""
        if spec.config is None:
            return given
        model = _resolve(spec.config)
        if isinstance(given, model):
            return given
        from pydantic import BaseModel, ValidationError

        if isinstance(given, BaseModel):
            given = given.model_dump(include=set(model.model_fields))
        if not isinstance(given, Mapping | None):
            kind = type(given).__name__
            raise ConfigError(Problem(f"settings are a mapping, not {kind}", key=spec.key))
        try:
            return model.model_validate(dict(given or {}))
        except ValidationError as error:
            raise ConfigError(
                Problem(
                    "unknown key" if item["type"] == "extra_forbidden" else item["msg"],
                    key=".".join([spec.section or spec.key, *map(str, item["loc"])]),
                    hint=did_you_mean(str(item["loc"][-1]), model.model_fields)
                    if item["type"] == "extra_forbidden"
                    else "",
                )
                for item in error.errors()
            ) from None

    def _build(self, spec: ProviderSpec, config: Any) -> tuple[Any, str]:
        """Build and probe; returns the provider, or the reason why it cannot be used."""
        built = self.manager.call_first("apt_build_provider", spec=spec, config=config)
        try:
            if built is not None:
                provider = built[1]
            else:
                provider = _resolve(spec.factory)(config)
                check_provider(provider, spec.kind)
        except BaseException as error:
            return None, self._reason(spec, error)
        reason = self.probe(spec, provider, config) if self.probe else None
        return provider, reason or ""

    def _reason(self, spec: ProviderSpec, error: BaseException) -> str:
        """Why a provider cannot be used whose code raised ``error``, which is being handled.

        It counts as a failure of its plugin, unless only an import failed. Errors with a message
        for the person, and those of the core, are raised again.
        """
        own = isinstance(error, AptError) and not isinstance(error, PluginError)
        if own or isinstance(error, KeyboardInterrupt) or self.manager.failures.ends_run(error):
            raise
        if isinstance(error, ImportError):
            return one_line(error)
        if spec.plugin == CORE:
            raise
        code: Any = spec.factory
        if isinstance(code, str):
            code = sys.modules.get(code.partition(":")[0])
        self.manager.failures.fail(spec.plugin, "apt_build_provider", error, code=code)
        return f"building it failed: {one_line(error)}"


class _OneSpec:
    """The plugin behind a provider that a script registered."""

    def __init__(self, spec: ProviderSpec) -> None:
        self._spec = spec

    @hookimpl
    def apt_register_providers(self) -> list[ProviderSpec]:
        return [self._spec]


def _resolve(target: Any) -> Any:
    """The object behind ``"module:attribute"``; anything else is returned as it is."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


class _Itself:
    """Equal to one of the same object alone, whatever that object calls equal."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _content(settings: Any) -> Any:
    """What is equal for settings of the same content only. How they print does not tell: a field
    may be left out there, a long array is cut. What cannot be looked into is equal to itself."""
    if settings is None or isinstance(settings, bool | int | float | str | bytes):
        return type(settings), repr(settings)
    pairs: Iterable[tuple[Any, Any]]
    if isinstance(settings, Mapping):
        pairs = settings.items()
    elif isinstance(settings, list | tuple):
        pairs = enumerate(settings)
    elif hasattr(type(settings), "model_fields"):
        parts = (vars(settings), settings.__pydantic_extra__, settings.__pydantic_private__)
        pairs = enumerate(dict(part) if part is not None else None for part in parts)
    else:
        return _Itself(settings)
    return type(settings), tuple((_content(key), _content(value)) for key, value in pairs)


def _told_by(cls: Any, method: str, default: Any) -> Any:
    """What a provider class tells of itself; ``default`` where it needs an instance for that."""
    tell = getattr(cls, method, None)
    if not isinstance(cls, type) or not callable(tell):
        return default
    try:
        return tell() if inspect.ismethod(tell) else tell(cls)
    except (AttributeError, TypeError):
        return default


def __getattr__(name: str) -> Any:
    """``registry``: the process-wide default for plain scripts, made on first use."""
    if name == "registry":
        globals()["registry"] = Registry()
        return globals()["registry"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
