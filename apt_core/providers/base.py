"""What every provider offers, whatever its kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ValidationError

from apt_core.errors import Problem, did_you_mean
from apt_core.section_errors import in_words

Settings = TypeVar("Settings", bound=BaseModel)


class Provider:
    """Base class of providers: an object that builds one kind of component from its settings.

    A subclass sets ``name``, ``version`` and ``dependencies`` and implements what its kind asks
    for (:class:`~apt_core.providers.attention.AttentionProvider`, …). The registry calls the class
    with one argument, the validated settings: a pydantic model, a mapping, or None for the
    defaults.

    >>> class Mine(Provider):
    ...     name = "mine"
    ...     dependencies = ("numpy>=1.26",)
    >>> Mine({"width": 3}).setting("width", 1), Mine().setting("width", 1)
    (3, 1)
    """

    name: ClassVar[str] = ""
    version: ClassVar[str] = ""
    dependencies: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any = None) -> None:
        self.config = config

    def get_name(self) -> str:
        """The name under which the provider is registered."""
        return self.name or type(self).__name__

    def get_version(self) -> str:
        """The version of the implementation, or an empty string."""
        return self.version

    def validate_config(self, config: Any) -> bool:
        """Whether ``config`` is acceptable; never raises. The default asks the constructor."""
        try:
            type(self)(config)
        except (TypeError, ValueError):
            return False
        return True

    def get_dependencies(self) -> list[str]:
        """PEP 508 requirements beyond APT's own."""
        return list(self.dependencies)

    def setting(self, key: str, default: Any) -> Any:
        """The value of one setting, or ``default`` where it is absent or None."""
        return read_setting(self.config, key, default)


class SettingsError(ValueError):
    """Settings that a provider cannot have: ``problems`` names each with its key."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(map(str, self.problems)))


def read_setting(config: Any, key: str, default: Any) -> Any:
    """Read ``key`` from a mapping, an object with attributes, or None.

    A dotted key descends: ``read_setting(config, "model.d_model", 256)``. ``default`` stands for
    a value that is absent or None.
    """
    value = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
        if value is None:
            return default
    return value


def read_settings(model: type[Settings], config: Any, section: str) -> Settings:
    """The settings ``model`` from itself, a mapping, an object with its attributes, or None (its
    defaults).

    Raises SettingsError, naming each key of the profile's ``section``, for a key of a mapping that
    is unknown and for values that are refused.
    """
    if isinstance(config, model):
        return config
    names = list(model.model_fields)
    given = (
        config
        if isinstance(config, Mapping)
        else {
            name: value for name in names if (value := read_setting(config, name, None)) is not None
        }
    )
    unknown = [key for key in given if key not in names]
    if unknown:
        raise SettingsError(
            Problem("unknown key", f"{section}.{key}", hint=did_you_mean(key, names))
            for key in unknown
        )
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise SettingsError(
            Problem(message, ".".join(map(str, (section, *details["loc"]))), hint=hint)
            for details in error.errors(include_url=False)
            for message, hint in [in_words(details)]
        ) from None
