"""Values from the command line: ``--training.max_epochs 5`` and ``--set training.max_epochs=5``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apt_core.config.yaml_text import parse_yaml
from apt_core.errors import ConfigError, Problem


@dataclass(frozen=True)
class Override:
    """One value that replaces what the profile says. ``where`` is how the person wrote it."""

    path: tuple[str, ...]
    value: Any
    where: str

    @property
    def key(self) -> str:
        return ".".join(self.path)


def parse_override(text: str, where: str = "") -> Override:
    """Read ``"training.max_epochs=5"``; the value follows the profile's own YAML rules.

    ``where`` is the option that it came from: ``"--set"``, or ``"--training.max_epochs"`` (the
    default). ``key=null`` takes a key back. Raises ConfigError for anything else.

    >>> parse_override("training.learning_rate=3e-5").value
    3e-05
    """
    key, equals, value_text = text.partition("=")
    key = key.strip()
    place = where if where.endswith(key) else f"{where} {key}"
    if not where:
        place = f"--{key}"
    hint = "write it as section.key=value, such as training.max_epochs=5"
    if not equals:
        raise ConfigError(Problem(f"{text!r} has no '='", where=where or "--set", hint=hint))
    path = tuple(key.split("."))
    if not all(part and part == part.strip() for part in path):
        raise ConfigError(Problem(f"{key!r} is no key", where=where or "--set", hint=hint))
    if not value_text.strip():
        hint = f"write {key}=null to take it back, or {key}='\"\"' for an empty text"
        raise ConfigError(Problem("no value is given", key=key, where=place, hint=hint))
    try:
        document = parse_yaml(value_text, place)
    except ConfigError as error:
        hint = "quote the text twice, such as --set 'name=\"a: b\"'"
        problem = error.problems[0]
        raise ConfigError(Problem(problem.message, key=key, where=place, hint=hint)) from None
    if document.problems:
        raise ConfigError(document.problems)
    return Override(path, document.data, place)
