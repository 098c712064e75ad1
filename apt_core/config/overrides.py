"""Values from the command line: ``--training.max_epochs 5`` and ``--set training.max_epochs=5``.

What a value is depends on its key: YAML for most, the argument as it is for text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from apt_core.config.yaml_text import MAX_DEPTH, KeyPath, is_encodable, parse_yaml
from apt_core.errors import ConfigError, Problem, shortened

MAX_OVERRIDES = 1_000


@dataclass(frozen=True)
class Override:
    """One value that replaces what the profile says. ``where`` is how the person wrote it.

    ``texts`` is the argument as it is, and the spelling of each scalar in it, by their paths below
    the key; ``problem`` what is wrong with it where it is not taken for text.
    """

    path: tuple[str, ...]
    value: Any
    where: str
    texts: Mapping[KeyPath, str | None] = field(default_factory=dict)
    problem: Problem | None = None

    @property
    def key(self) -> str:
        return ".".join(self.path)


def parse_override(text: str, where: str = "") -> Override:
    """Read ``"training.max_epochs=5"``; the value follows the profile's own YAML rules, unless the
    key turns out to be text.

    ``where`` is the option that it came from: ``"--set"``, or ``"--training.max_epochs"`` (the
    default). ``key=null`` takes a key back. Raises ConfigError for what names no key.

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
        raise ConfigError(f"{shortened(text, 200)!r} has no '='", where=where or "--set", hint=hint)
    path = tuple(key.split("."))
    if len(path) > MAX_DEPTH:
        message = f"a key of {len(path):,} parts, and no profile is deeper than {MAX_DEPTH}"
        raise ConfigError(message, where=where or "--set")
    if not (is_encodable(key) and all(part and part == part.strip() for part in path)):
        raise ConfigError(f"{shortened(key, 200)!r} is no key", where=where or "--set", hint=hint)
    if value_text == "null":
        return Override(path, None, place)
    texts: dict[KeyPath, str | None] = {(): value_text} if is_encodable(value_text) else {}
    if not value_text.strip():
        problem = Problem("no value is given", key, place, f"write {key}=null to take it back")
        return Override(path, value_text, place, texts, problem)
    try:
        document = parse_yaml(value_text, place)
    except ConfigError as error:
        problem = Problem(error.problems[0].message, key, place)
        return Override(path, value_text, place, texts, problem)
    twice = [Problem(found.message, key, place, found.hint) for found in document.problems]
    texts = {**document.texts, **texts}
    return Override(path, document.data, place, texts, twice[0] if twice else None)
