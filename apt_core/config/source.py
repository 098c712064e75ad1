"""What was read, before validation: plain data, and the place that each value comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from apt_core.config.overrides import Override
from apt_core.config.yaml_text import MAX_DEPTH, MAX_NODES, Document, KeyPath, dotted
from apt_core.errors import ConfigError, Problem

# What a file says about itself, which no other file inherits.
IDENTITY = ("name", "version", "description", "extends")


@dataclass(frozen=True)
class Source:
    """A profile as written. ``problems`` are those found while reading (a key given twice, an
    override that fits nowhere); :func:`apt_core.config.validate` reports them with its own.
    ``folder`` is where the profile's file lies, if it is one."""

    name: str
    data: dict[str, Any]
    problems: tuple[Problem, ...] = ()
    places: Mapping[KeyPath, str] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def from_dict(cls, profile: Mapping[str, Any], name: str = "profile") -> Source:
        """A source from plain data instead of a file. Raises ConfigError if it is no mapping."""
        if not isinstance(profile, Mapping):
            raise ConfigError(f"a profile is a mapping, not {type(profile).__name__}")
        copier = _Copier()
        data = copier.copy(profile, ())
        data.pop("extends", None)
        return cls(name, data, tuple(copier.problems), {(): name})

    def where(self, path: str | KeyPath) -> str:
        """The place of a key (``"tiny_debug.yaml:12"``, ``"--training.max_epochs"``), or of the
        nearest section around it that was written down."""
        keys = parse_path(path) if isinstance(path, str) else path
        for length in range(len(keys), -1, -1):
            if keys[:length] in self.places:
                return self.places[keys[:length]]
        return self.name

    def get(self, path: str | KeyPath, default: Any = None) -> Any:
        """The value as written, or ``default`` where nothing is."""
        value: Any = self.data
        for key in parse_path(path) if isinstance(path, str) else path:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return default
        return value

    def has(self, path: str | KeyPath) -> bool:
        """Is a value written at this path?"""
        missing = object()
        return self.get(path, missing) is not missing

    def with_overrides(self, overrides: Iterable[Override]) -> Source:
        """A copy with values from the command line, in their order."""
        layer = self
        for override in overrides:
            layer = layer._with_override(override)
        return layer

    def _with_override(self, override: Override) -> Source:
        section: Any = self.data
        for depth, key in enumerate(override.path[:-1]):
            section = section.get(key)
            if section is None:
                break
            if not isinstance(section, dict):
                above = dotted(override.path[: depth + 1])
                kind = "a list" if isinstance(section, list) else "a single value"
                problem = Problem(
                    f"{above} is {kind}, so it has no keys",
                    key=override.key,
                    where=override.where,
                    hint=f"replace it as a whole: --set {above}=…",
                )
                return replace(self, problems=(*self.problems, problem))
        data: Any = override.value
        places: dict[KeyPath, str] = {}
        _mark_places(data, override.path, override.where, places)
        for key in reversed(override.path):
            data = {key: data}
        return self.below(Source(self.name, data, (), places, self.folder))

    def below(self, child: Source) -> Source:
        """``child`` on top of this one: mappings merge, lists replace, null deletes."""
        places = dict(self.places)
        data = _merge(self.data, child.data, (), places, child.places)
        if () in child.places:
            places[()] = child.places[()]
        return Source(child.name, data, (*self.problems, *child.problems), places, child.folder)

    def inherited(self) -> Source:
        """This source as a parent: without what it says about itself."""
        data = {key: value for key, value in self.data.items() if key not in IDENTITY}
        return replace(self, data=data)


def from_document(document: Document, name: str, label: str, folder: Path | None = None) -> Source:
    """A source from a parsed file whose data is a mapping."""
    places = {path: f"{label}:{line}" for path, line in document.lines.items()}
    places[()] = label
    return Source(name, document.data, tuple(document.problems), places, folder)


def parse_path(path: str) -> KeyPath:
    """The inverse of :func:`dotted`.

    >>> parse_path("plugins[0].priority")
    ('plugins', 0, 'priority')
    """
    keys: list[str | int] = []
    for part in path.split("."):
        word, *indices = re.split(r"\[([0-9]+)\]", part)
        keys += [word] if word else []
        keys += [int(index) for index in indices if index]
    return tuple(keys)


def _merge(
    parent: dict[str, Any],
    child: Mapping[str, Any],
    path: KeyPath,
    places: dict[KeyPath, str],
    child_places: Mapping[KeyPath, str],
) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        here = (*path, key)
        if value is None and key in parent:
            del merged[key]
            _forget_places(here, places)
        elif isinstance(value, dict) and isinstance(parent.get(key), dict):
            if here in child_places:
                places[here] = child_places[here]
            merged[key] = _merge(parent[key], value, here, places, child_places)
        else:
            merged[key] = value
            _forget_places(here, places)
            for place, text in child_places.items():
                if place[: len(here)] == here:
                    places[place] = text
    return merged


def _forget_places(path: KeyPath, places: dict[KeyPath, str]) -> None:
    for place in [place for place in places if place[: len(path)] == path]:
        del places[place]


def _mark_places(data: Any, path: KeyPath, text: str, places: dict[KeyPath, str]) -> None:
    places[path] = text
    items = data.items() if isinstance(data, dict) else ()
    for key, value in items:
        _mark_places(value, (*path, key), text, places)


class _Copier:
    """Copies a Python mapping into dicts, lists and scalars, within bounds."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.count = 0

    def copy(self, value: Any, path: KeyPath) -> Any:
        self.count += 1
        if len(path) > MAX_DEPTH or self.count > MAX_NODES:
            raise ConfigError(Problem("nested too deeply or too large", key=dotted(path[:5])))
        if isinstance(value, Mapping):
            return self.mapping(value, path)
        if isinstance(value, list | tuple):
            return [self.copy(item, (*path, index)) for index, item in enumerate(value)]
        return str(value) if isinstance(value, PurePath) else value

    def mapping(self, value: Mapping[Any, Any], path: KeyPath) -> dict[str, Any]:
        copied: dict[str, Any] = {}
        for key, item in value.items():
            if isinstance(key, str):
                copied[key] = self.copy(item, (*path, key))
            else:
                kind = type(key).__name__
                self.problems.append(Problem(f"a key must be text, not {kind}", dotted(path)))
        return copied
