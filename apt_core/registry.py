"""The provider registry: builds what the catalogue knows, or the kind's default in its place.

A profile selects a provider by kind and name, never by priority. A provider that is registered but
cannot be used here falls back to its kind's default, with the reason; a name that nobody registers
is bad input.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import Any

from apt_core.catalogue import Catalogue, resolve
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
from apt_core.log import get_logger
from apt_core.markers import hookimpl
from apt_core.plugin_manager import PluginManager
from apt_core.requirements import unmet
from apt_core.types import CORE, FallbackEvent, ProviderSpec

log = get_logger("apt.registry")

Probe = Callable[[ProviderSpec, Any, Any], "str | None"]
"""``probe(spec, provider, config)``: None if the provider works here, else the reason."""


@dataclass(frozen=True)
class Resolution:
    """The provider that was asked for, the one that is used, and the reason if they differ."""

    kind: str
    asked: str
    used: str
    reason: str = ""

    def row(self) -> dict[str, str]:
        """The row of the manifest."""
        return {"kind": self.kind, "asked": self.asked, "used": self.used, "reason": self.reason}


class Registry:
    """Builds the providers that are ``known``, each once for the same settings.

    ``profile`` is the validated config: a provider's settings are its ``section`` there. ``probe``
    tries a provider before it is used; without one every provider that can be built is taken.
    ``known`` is by default what the plugins of ``manager`` declare. ``resolutions`` says of every
    provider that was asked for which one is used.
    """

    def __init__(
        self,
        manager: PluginManager | None = None,
        *,
        known: Catalogue | None = None,
        profile: Any = None,
        probe: Probe | None = None,
        strict: bool = False,
    ) -> None:
        self.manager = manager or PluginManager()
        self.known = known or self._declared()
        self.profile = profile
        self.probe = probe
        self.strict = strict
        self.resolutions: dict[tuple[str, str], Resolution] = {}
        self._built: dict[tuple[str, str, Any], Any] = {}

    def _declared(self) -> Catalogue:
        return Catalogue(self.manager.call_each("apt_register_providers"))

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
        if self.has(kind, name) and self.spec(kind, name).factory is cls:
            return
        spec = ProviderSpec(
            kind,
            name,
            cls,
            version=str(_fact_of_class(cls, "get_version", "")),
            requires=tuple(_fact_of_class(cls, "get_dependencies", ())),
            conflicts=tuple(excludes),
            default=default,
        )
        plugin_name = f"script:{kind}:{name}"
        problem = self.known.check_spec(plugin_name, spec)
        if problem:
            raise ConfigError(problem)
        self.manager.register(_OneSpec(spec), plugin_name)
        self.known = self._declared()

    # What is known, for scripts and plugins ----------------------------------------------------

    def has(self, kind: str, name: str) -> bool:
        return (kind, name) in self.known

    def spec(self, kind: str, name: str) -> ProviderSpec:
        """See :meth:`Catalogue.spec`."""
        return self.known.spec(kind, name)

    def list_providers(self, kind: str | None = None) -> dict[str, list[str]]:
        """See :meth:`Catalogue.list_providers`."""
        return self.known.list_providers(kind)

    def get_info(self, kind: str, name: str) -> dict[str, Any]:
        """See :meth:`Catalogue.get_info`."""
        return self.known.get_info(kind, name)

    def check_conflicts(self, keys: Iterable[str]) -> list[Problem]:
        """See :meth:`Catalogue.check_conflicts`."""
        return self.known.check_conflicts(keys)

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
            default = self.known.default(kind)
            if default is None:
                raise ConfigError(f"kind {kind!r} has no default provider: name one")
            return default
        return self.spec(kind, name)

    def _fall_back(self, spec: ProviderSpec, settings: Any, reason: str, fallback: bool) -> Any:
        """Build the default of the kind in place of ``spec``; record, log and report that."""
        default = self.known.replacement(spec)
        if default is None:
            raise ProviderError(f"{spec.key} (plugin {spec.plugin}) cannot be used: {reason}")
        message = f"{spec.kind}: {spec.name} not usable ({reason})"
        if self.strict or not fallback:
            because = "--strict is on" if self.strict else "fallback=False"
            raise ConfigError(
                f"{message}, and no fallback is allowed: {because}", hint=f"ask for {default.name}"
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
            f"{message}: using {default.name}",
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
        reason = self.known.blocked_because(spec) or "; ".join(unmet(spec.requires))
        if reason:
            return given, reason
        try:
            return self._config_for(spec, given), ""
        except BaseException as error:
            return given, self._reason(spec, error)

    def _config_for(self, spec: ProviderSpec, given: Any) -> Any:
        """The provider's config: what was given, validated, else defaults."""
        if spec.config is None:
            return given
        model = resolve(spec.config)
        if isinstance(given, model):
            return given
        from pydantic import BaseModel, ValidationError

        if isinstance(given, BaseModel):
            given = given.model_dump(include=set(model.model_fields))
        if not isinstance(given, Mapping | None):
            kind = type(given).__name__
            raise ConfigError(f"settings are a mapping, not {kind}", key=spec.key)
        try:
            return model.model_validate(dict(given or {}))
        except ValidationError as error:
            raise ConfigError(
                Problem(
                    message, ".".join([spec.section or spec.key, *map(str, item["loc"])]), hint=hint
                )
                for item in error.errors(include_url=False)
                for message, hint in [_in_words(item, model)]
            ) from None

    def _build(self, spec: ProviderSpec, config: Any) -> tuple[Any, str]:
        """Build and probe; returns the provider, or the reason why it cannot be used."""
        built = self.manager.call_first("apt_build_provider", spec=spec, config=config)
        try:
            if built is not None:
                provider = built[1]
            else:
                provider = resolve(spec.factory)(config)
                check_provider(provider, spec.kind)
        except BaseException as error:
            return None, self._reason(spec, error)
        reason = self.probe(spec, provider, config) if self.probe else None
        return provider, reason or ""

    def _reason(self, spec: ProviderSpec, error: BaseException) -> str:
        """The reason why a provider whose code raised ``error`` cannot be used; called while it is
        handled.

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


class _Itself:
    """Compares by the identity of an object, whatever its own equality says."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _in_words(error: Any, model: Any) -> tuple[str, str]:
    """What is wrong with a setting of a section ``model``, and a hint or an empty text."""
    if error["type"] == "extra_forbidden":
        return "unknown key", did_you_mean(str(error["loc"][-1]), model.model_fields)
    from apt_core.section_errors import in_words

    return in_words(error)


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


def _fact_of_class(cls: Any, method: str, default: Any) -> Any:
    """What ``method`` of a provider class returns without an instance, else ``default``."""
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
