"""What was read, before validation: plain data, and the place that each value comes from."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel

from apt_core.config.overrides import MAX_OVERRIDES, Override
from apt_core.config.text_keys import TextKeys
from apt_core.config.yaml_text import (
    MAX_DEPTH,
    MAX_NODES,
    KeyPath,
    ParsedYaml,
    dotted,
    is_encodable,
)
from apt_core.errors import ConfigError, Problem
from apt_core.plugin_names import name_of
from apt_core.profile_paths import FOUND_BESIDE
from apt_core.secrets import MASK, is_secret

# What a file says about itself, which no other file inherits.
IDENTITY = ("name", "version", "description", "extends")

SHOWN = 6
"""Keys or items of a section or a list that a message names."""


@dataclass(frozen=True)
class InactiveKey:
    """A key of the profile that does nothing here, and why. ``unclaimed``: no active plugin has it;
    a blocked or broken one may."""

    key: str
    reason: str
    unclaimed: bool = field(default=False, compare=False)


@dataclass
class Marks:
    """Facts about values, by path: their ``places``, their spelling
    (``texts``), what is ``wrong`` with one that is not taken for text, and the ``folders`` of the
    files that say paths."""

    places: dict[KeyPath, str] = field(default_factory=dict)
    texts: dict[KeyPath, str | None] = field(default_factory=dict)
    wrong: dict[KeyPath, Problem] = field(default_factory=dict)
    folders: dict[KeyPath, Path] = field(default_factory=dict)

    def without(self, paths: Collection[KeyPath]) -> Marks:
        """A copy without the facts about these values and all within them."""
        return Marks(*({at: mark for at, mark in known.items() if not _is_within(at, paths)}
                       for known in self._all))  # fmt: skip

    def only(self, paths: Collection[KeyPath]) -> Marks:
        """A copy with the facts about these values and all within them only."""
        return Marks(*({at: mark for at, mark in known.items() if _is_within(at, paths)}
                       for known in self._all))  # fmt: skip

    def update(self, other: Marks) -> None:
        """Add the facts of ``other``."""
        for known, more in zip(self._all, other._all, strict=True):
            known.update(more)

    @property
    def _all(self) -> tuple[dict[KeyPath, Any], ...]:
        return self.places, self.texts, self.wrong, self.folders


def _is_within(path: KeyPath, paths: Collection[KeyPath]) -> bool:
    return any(path[:length] in paths for length in range(len(path) + 1))


@dataclass(frozen=True)
class Source:
    """A profile as written.

    ``problems`` are those found while reading (a key given twice, an override that fits nowhere),
    ``inactive`` the keys that changed nothing, ``notices`` what else is to be told of it;
    :func:`apt_core.config.validate` reports them with its own. ``bare`` are the keys after which
    nothing stands in the profile's file, ``files`` the labels of those that make it up, parents
    first. ``recorded`` says that it is of a run that was accepted when it began.
    """

    name: str
    data: dict[str, Any]
    problems: tuple[Problem, ...] = ()
    marks: Marks = field(default_factory=Marks)
    bare: frozenset[KeyPath] = frozenset()
    inactive: tuple[InactiveKey, ...] = ()
    notices: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    recorded: bool = False

    @classmethod
    def from_dict(
        cls, profile: Mapping[str, Any], name: str = "profile", *, recorded: bool = False
    ) -> Source:
        """A source from plain data instead of a file. Raises ConfigError if it is no mapping."""
        if not isinstance(profile, Mapping):
            raise ConfigError(f"a profile is a mapping, not {type(profile).__name__}")
        copier = _Copier()
        data = copier.copy(profile, ())
        data.pop("extends", None)
        marks = Marks({(): name})
        return cls(name, data, tuple(copier.problems), marks, recorded=recorded)

    def where(self, path: str | KeyPath) -> str:
        """The place of a key (``"tiny_debug.yaml:12"``, ``"--training.max_epochs"``), or of the
        nearest section around it that was written down."""
        keys = parse_path(path) if isinstance(path, str) else path
        for length in range(len(keys), -1, -1):
            if keys[:length] in self.marks.places:
                return self.marks.places[keys[:length]]
        return self.name

    def folder_of(self, path: KeyPath) -> Path | None:
        """Where the profile's file lies that says this path; None for the command line's."""
        return self.marks.folders.get(path)

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
        """Whether a value is written at this path."""
        missing = object()
        return self.get(path, missing) is not missing

    @property
    def last_layer(self) -> int:
        """The :meth:`layer` of the command line."""
        return max(len(self.files), 1)

    def layer(self, path: str | KeyPath) -> int:
        """Which of the layers a value is from: 0 for the uppermost profile, one more for each that
        extends it, and one more for the command line; -1 where nothing is written."""
        if not self.has(path):
            return -1
        where = self.where(path)
        if where.startswith("--"):
            return self.last_layer
        found = [i for i, f in enumerate(self.files) if where == f or where.startswith(f"{f}:")]
        return found[-1] if found else 0

    def leaves(self, path: str | KeyPath) -> Iterator[KeyPath]:
        """The paths of all single values and lists that are written at or below ``path``."""
        keys = parse_path(path) if isinstance(path, str) else path
        value = self.get(keys)
        if isinstance(value, dict):
            for key in value:
                yield from self.leaves((*keys, key))
        elif value is not None:
            yield keys

    def with_overrides(self, overrides: Iterable[Override]) -> Source:
        """A copy with values from the command line, in their order. Raises ConfigError for more
        than 1,000."""
        overrides = list(overrides)
        if len(overrides) > MAX_OVERRIDES:
            message = f"{len(overrides):,} keys are given, and at most {MAX_OVERRIDES:,} are taken"
            raise ConfigError(message, "--set", hint="write a profile that extends this")
        layer = self
        for override in overrides:
            layer = layer._with_override(override)
        return layer

    def with_text(self, model: type[BaseModel], skip: Collection[str] = ()) -> Source:
        """A copy in which the keys that are text for ``model``, that of a whole profile, are as
        they were written. The sections ``skip`` stay as they are."""
        return replace(self, data=TextKeys(self.marks.texts).section(self.data, model, skip=skip))

    def _with_override(self, override: Override) -> Source:
        section: Any = self.data
        for depth, key in enumerate(override.path[:-1]):
            name, bracket, _ = key.partition("[")
            if bracket:
                listed = dotted((*override.path[:depth], name))
                problem = Problem(
                    "the items of a list are not set one by one",
                    key=override.key,
                    where=override.where,
                    hint=f"replace the list as a whole: --set {listed}=…",
                )
                return replace(self, problems=(*self.problems, problem))
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
        marks = Marks(texts={(*override.path, *path): t for path, t in override.texts.items()})
        _mark_places(data, override.path, override.where, marks.places)
        for depth in range(1, len(override.path)):  # sections that are new with it
            if not self.has(override.path[:depth]):
                marks.places[override.path[:depth]] = override.where
        if override.problem is not None:
            marks.wrong[override.path] = override.problem
        for key in reversed(override.path):
            data = {key: data}
        return self.below(Source(self.name, data, (), marks))

    def below(self, child: Source) -> Source:
        """``child`` on top of this one: mappings merge, lists replace, null takes back.

        What a section or a list with nothing after its key would drop is a problem: the keys may
        have been commented out one by one. null says that it is meant, which is told.
        """
        merge = _Merge(self, child)
        data = merge.mappings(self.data, child.data, ())
        marks = merge.marks()
        if () in child.marks.places:
            marks.places[()] = child.marks.places[()]
        return Source(
            child.name,
            data,
            (*self.problems, *child.problems, *merge.problems),
            marks,
            files=tuple(dict.fromkeys((*self.files, *child.files))),
            inactive=(*self.inactive, *child.inactive, *merge.inactive),
            notices=(*self.notices, *child.notices, *merge.notices),
            recorded=self.recorded,
        )

    def inherited(self) -> Source:
        """This source as a parent: without what it says about itself."""
        data = {key: value for key, value in self.data.items() if key not in IDENTITY}
        return replace(self, data=data)


def from_document(
    document: ParsedYaml, name: str, label: str, folder: Path | None = None
) -> Source:
    """A source from a parsed file whose data is a mapping."""
    places = {path: f"{label}:{line}" for path, line in document.lines.items()}
    places[()] = label
    marks = Marks(places, document.texts)
    if folder is not None:
        marks.folders.update((path, folder) for path in FOUND_BESIDE)
    bare = frozenset(document.bare)
    problems = tuple(document.problems)
    return Source(name, document.data, problems, marks, bare, files=(label,))


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


class _Merge:
    """Puts the data of one source on top of another's."""

    def __init__(self, parent: Source, child: Source) -> None:
        self.parent, self.child = parent, child
        self.dropped: set[KeyPath] = set()
        self.replaced: set[KeyPath] = set()
        self.sections: set[KeyPath] = set()
        self.problems: list[Problem] = []
        self.inactive: list[InactiveKey] = []
        self.notices: list[str] = []

    def marks(self) -> Marks:
        """What is known of the merged data. Looked up once for all: a profile may have many keys,
        and both of them all the same."""
        marks = self.parent.marks.without(self.dropped | self.replaced)
        marks.update(self.child.marks.only(self.replaced))
        places = self.child.marks.places
        marks.places.update((at, places[at]) for at in self.sections if at in places)
        return marks

    def mappings(
        self, parent: dict[str, Any], child: Mapping[str, Any], path: KeyPath
    ) -> dict[str, Any]:
        merged = dict(parent)
        for key, value in child.items():
            here = (*path, key)
            below = parent.get(key)
            if value is None and key in parent:
                if isinstance(below, dict | list) and below and not self.meant(here, below):
                    continue
                del merged[key]
                self.dropped.add(here)
            elif isinstance(value, dict) and isinstance(below, dict):
                self.sections.add(here)
                if below and not value:
                    self.unchanged(here, below)
                merged[key] = self.mappings(below, value, here)
            else:
                if here == ("plugins",):
                    self.note_lost_options(below, value)
                merged[key] = value
                self.replaced.add(here)
        return merged

    def note_lost_options(self, below: Any, value: Any) -> None:
        """Add a notice about options of plugins that are lost because another list replaces
        theirs."""
        before = dict(plugin_items(below))
        for name, options in plugin_items(value):
            lost = {key: old for key, old in before.get(name, {}).items() if key not in options}
            if lost:
                words = ", ".join(f"{key}: {old}" for key, old in lost.items())
                self.notices.append(
                    f"{self.child.where('plugins')}: plugins: the inherited list, which this one "
                    f"replaces, says {words} of {name}"
                )

    def meant(self, path: KeyPath, below: Any) -> bool:
        """Whether the inherited value is to be dropped; adds a notice that it is, or a problem if
        that is unclear."""
        key, where = dotted(path), self.child.where(path)
        lost = MASK if is_secret(path[-1], below) else _summary(below)
        if path in self.child.bare:
            message = f"nothing stands under it, and it inherits {lost}"
            hint = "take the key out to keep that, or write null after it to do without"
            self.problems.append(Problem(message, key, where, hint))
            return False
        self.notices.append(f"{where}: {key}: null takes back what was set: {lost}")
        return True

    def unchanged(self, path: KeyPath, below: Any) -> None:
        reason = f"an empty section changes nothing of what it inherits: {_summary(below)}"
        key = dotted(path)
        self.inactive.append(InactiveKey(key, f"{reason}; `{key}: null` takes it back"))


def plugin_items(listed: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The normalised names in a list of plugins, with their options."""
    for item in listed if isinstance(listed, list) else ():
        options = dict(item) if isinstance(item, dict) else {"name": item}
        name = options.pop("name", None)
        if isinstance(name, str):
            yield name_of(name), options


def _summary(value: dict[str, Any] | list[Any]) -> str:
    """What a section or a list holds, in a few words."""
    words = [str(item.get("name", "…")) if isinstance(item, dict) else str(item) for item in value]
    return ", ".join(word[:60] for word in words[:SHOWN]) + (", …" if len(words) > SHOWN else "")


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
            raise ConfigError("nested too deeply or too large", key=dotted(path[:5]))
        if isinstance(value, Mapping):
            return self.mapping(value, path)
        if isinstance(value, list | tuple):
            return [self.copy(item, (*path, index)) for index, item in enumerate(value)]
        return str(value) if isinstance(value, PurePath) else value

    def mapping(self, value: Mapping[Any, Any], path: KeyPath) -> dict[str, Any]:
        copied: dict[str, Any] = {}
        for key, item in value.items():
            if isinstance(key, str) and is_encodable(key):
                copied[key] = self.copy(item, (*path, key))
            elif isinstance(key, str):
                message = f"{key!r} is no key: half a surrogate pair is no character"
                self.problems.append(Problem(message, dotted(path)))
            else:
                kind = type(key).__name__
                self.problems.append(Problem(f"a key must be text, not {kind}", dotted(path)))
        return copied
