"""What is wrong with a key, in words for the person who wrote the profile."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from apt_core.config.schema import Config
from apt_core.config.source import Source
from apt_core.config.yaml_text import KeyPath, dotted
from apt_core.errors import Problem
from apt_core.secrets import MASK, is_secret_name, redact
from apt_core.section_errors import in_words
from apt_core.sections import Ramp
from apt_core.synonyms import key_meant, plain_word, value_meant

_MANY_KEYS = 14
_NEEDS = "a plugin's needs the plugin"
_MAX_GUESSES = 100
"""The most unknown keys for which a suggestion is searched, which is slow."""
_ANY_RAMP = "schedules.*"


def problem_of(
    error: ErrorDetails, path: KeyPath, source: Source, *, secret: bool = False
) -> Problem:
    """The problem at ``path`` that pydantic reports as ``error`` (any but an unknown key). The
    value of a ``secret``, which one may also be by its name, is not in it."""
    value = error.get("input")
    if secret or any(isinstance(key, str) and is_secret_name(key) for key in path[1:]):
        shown = value if value is None or isinstance(value, bool | Mapping | list) else MASK
        message, _ = in_words({**error, "input": shown})
        return Problem(redact(message), dotted(path), source.where(path))
    message, hint = in_words(error)
    message = redact(message)
    if isinstance(value, str) and (meant := value_meant(dotted(path), value[:60])):
        hint = f"did you mean {meant}?"
    return Problem(message, dotted(path), source.where(path), hint)


class KnownKeys:
    """All known keys, for suggestions on unknown ones.

    ``children`` maps a section's dotted path to its keys; ``schedules.*`` stands for any ramp.
    A key under which ``source`` has a section is taken for a misspelt section, not for another key.
    """

    def __init__(
        self,
        core: type[BaseModel],
        sections: Mapping[str, type[BaseModel]],
        source: Source | None = None,
    ) -> None:
        self._source = source
        self._meant: dict[KeyPath, KeyPath | None] = {}
        self.unknown: list[KeyPath] = []
        self.children: dict[str, set[str]] = {"": set()}
        self._add(core, "")
        self._add(Ramp, _ANY_RAMP)
        for path, model in sections.items():
            parts = path.split(".")
            for depth, part in enumerate(parts):
                self.children.setdefault(".".join(parts[:depth]), set()).add(part)
            self._add(model, path)
        self.places: dict[str, str] = {}
        for section, names in sorted(self.children.items(), reverse=True):
            if section not in ("plugins", _ANY_RAMP):
                self.places |= {name: f"{section}.{name}" if section else name for name in names}

    def _add(self, model: type[BaseModel], path: str) -> None:
        keys = self.children.setdefault(path, set())
        for name, field in model.model_fields.items():
            key = field.alias or name
            keys.add(key)
            for inner in models_in(field.annotation):
                self._add(inner, f"{path}.{key}" if path else key)

    def problem(self, path: KeyPath, source: Source) -> Problem:
        """The problem of an unknown key at ``path``, which is kept in ``unknown``."""
        self.unknown.append(path)
        return Problem("unknown key", dotted(path), source.where(path), self._hint(path))

    def meant(self, path: KeyPath) -> KeyPath | None:
        """The known key that an unknown one was probably meant to be; None where that cannot be
        told, or has been asked of too many."""
        if path and path not in self._meant and len(self._meant) < _MAX_GUESSES:
            self._meant[path] = self._guess(path)
        return self._meant.get(path)

    def _guess(self, path: KeyPath) -> KeyPath | None:
        key, siblings = str(path[-1])[:200], self._siblings(path)
        if key in siblings:
            return None
        for word in (key, plain_word(key)):
            if word in siblings:
                return (*path[:-1], word)
            if word in self.places:
                return tuple(self.places[word].split("."))
        places = self.places
        if self._is_section(path):
            siblings = [name for name in siblings if dotted((*path[:-1], name)) in self.children]
            places = {word: place for word, place in places.items() if place in self.children}
        ours = key_meant(key)
        if ours.rpartition(".")[0] == self._section(path) and self._known(ours):
            return (*path[:-1], ours.rpartition(".")[2])
        # What stands in the same section under nearly this name is nearer than a word of others.
        if near := difflib.get_close_matches(key, siblings, n=1, cutoff=0.85):
            return (*path[:-1], near[0])
        if ours and self._known(ours):
            return tuple(ours.split("."))
        if near := difflib.get_close_matches(key, siblings, n=1, cutoff=0.6):
            return (*path[:-1], near[0])
        if far := difflib.get_close_matches(key, places, n=1, cutoff=0.8):
            return tuple(places[far[0]].split("."))
        return None

    def _is_section(self, path: KeyPath) -> bool:
        return self._source is not None and isinstance(self._source.get(path), Mapping)

    def _known(self, key: str) -> bool:
        section, _, name = key.rpartition(".")
        return name in self.children.get(section, ())

    def _siblings(self, path: KeyPath) -> list[str]:
        return sorted(self.children.get(self._section(path), ()))

    def _section(self, path: KeyPath) -> str:
        around = [part for part in path[:-1] if isinstance(part, str)]
        return _ANY_RAMP if around[:1] == ["schedules"] and around[1:] else ".".join(around)

    def _hint(self, path: KeyPath) -> str:
        if meant := self.meant(path):
            here = meant[:-1] == path[:-1]
            return f"did you mean {meant[-1] if here else dotted(meant)!r}?"
        siblings = self._siblings(path)
        if len(path) == 1:
            return f"known sections: {', '.join(siblings)}; {_NEEDS}"
        if siblings and len(siblings) <= _MANY_KEYS:
            return f"known keys here: {', '.join(siblings)}"
        listed = "`apt-hooks schema` lists every key"
        return f"{listed}; {_NEEDS}" if self._is_section(path) else listed


def key_like(word: str) -> str:
    """The dotted key of the core that is called ``word``, or that others call so, or ''."""
    known, path = KnownKeys(Config, {}), tuple(word.split("."))
    if len(path) > 1:
        section = ".".join(path[:-1])
        return word if path[-1] in known.children.get(section, ()) else ""
    return known.places.get(plain_word(word), "") or key_meant(word)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation holds directly, in a union, or as items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, list, tuple):
        for argument in get_args(annotation):
            yield from models_in(argument)


def ignored_keys(model: type[BaseModel], data: Any, path: KeyPath) -> Iterator[KeyPath]:
    """Keys that ``model`` would silently ignore, as a pydantic model of a plugin does by
    default."""
    if isinstance(data, list):
        for index, item in enumerate(data):
            yield from ignored_keys(model, item, (*path, index))
    if not isinstance(data, Mapping) or model.model_config.get("extra") == "allow":
        return
    names: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        names[name] = names[field.alias or name] = field.annotation
    for key, value in data.items():
        if key not in names:
            yield (*path, key)
            continue
        for inner in models_in(names[key]):
            yield from ignored_keys(inner, value, (*path, key))
