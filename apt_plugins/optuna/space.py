"""The space file: which keys of the profile are searched, and between what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, log10
from pathlib import Path
from typing import Any, Literal

from apt_core import ConfigError, Problem
from apt_core.config import Override
from apt_core.config.yaml_text import KeyPath, ParsedYaml, dotted, is_encodable, parse_yaml
from apt_core.errors import did_you_mean
from apt_core.files import read_file
from apt_core.json_files import MAX_BYTES

RANGE = ("low", "high", "step", "log", "when")
CHOICES = ("choices", "when")
MARKS = ("low", "high", "choices")
"""A mapping with one of these keys is a dimension, any other a section of the profile."""

MAX_DIMENSIONS = 200
MAX_CHOICES = 1_000

Kind = Literal["float", "int", "choice"]


@dataclass(frozen=True)
class Dimension:
    """A key of the profile and its values: numbers from ``low`` to ``high``, both taken, or
    ``choices``.

    ``step`` is the distance of the values, None for all floats between the ends; ``log`` samples
    the logarithm evenly. ``when`` maps keys of other dimensions to the values with which this one
    is searched; with others the profile's own value stays. ``spelled`` is how each choice is
    written, for keys that are text.
    """

    key: str
    kind: Kind
    where: str
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    spelled: tuple[Mapping[KeyPath, str | None], ...] = field(default=(), compare=False)

    @property
    def labels(self) -> tuple[Any, ...]:
        """The choices as a study records them: single values as they are, others as text."""
        return tuple(map(label, self.choices))

    def values(self) -> tuple[Any, ...]:
        """The values that are tried before a study begins: both ends, or every choice, as a study
        records them."""
        return self.labels if self.kind == "choice" else (self.low, self.high)

    def is_searched(self, values: Mapping[str, Any]) -> bool:
        """Whether the dimension has a value in a trial with these values of others."""
        return all(_is_in(values.get(key), wanted) for key, wanted in self.when.items())

    def contains(self, value: Any) -> bool:
        """Whether the dimension may take a value, as a study records it."""
        if self.kind == "choice":
            return _is_in(value, self.labels)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if not self.low <= value <= self.high or (self.kind == "int" and value != int(value)):
            return False
        steps = (value - self.low) / self.step if self.step and not self.log else 0.0
        return abs(steps - round(steps)) < 1e-8

    def override(self, value: Any) -> Override:
        """What sets the key to a value, as a study records it."""
        path = tuple(self.key.split("."))
        where = f"--space {self.where}"
        if self.kind != "choice":
            return Override(path, value, where)
        index = next(i for i, each in enumerate(self.labels) if _is_same(each, value))
        texts = self.spelled[index] if self.spelled else {}
        return Override(path, self.choices[index], where, texts)

    def row(self) -> dict[str, Any]:
        """The dimension as plain data, as a study records it."""
        row: dict[str, Any] = {"kind": self.kind}
        if self.kind == "choice":
            row["choices"] = list(self.choices)
        else:
            row |= {"low": self.low, "high": self.high, "log": self.log, "step": self.step}
        if self.when:
            row["when"] = {key: list(values) for key, values in self.when.items()}
        return row

    def in_words(self) -> str:
        """Its values, and when it is searched, on one line."""
        if self.kind == "choice":
            words = " | ".join(map(str, self.labels))
        else:
            words = f"{self.low:g} to {self.high:g}"
            words += f" in steps of {self.step:g}" if self.step and self.step != 1 else ""
            words += ", log" if self.log else ""
            words += ", whole" if self.kind == "int" else ""
        for key, values in self.when.items():
            words += f", when {key} is {' or '.join(map(str, values))}"
        return words


@dataclass(frozen=True)
class Space:
    """The dimensions of a study, each after those that it depends on."""

    dimensions: tuple[Dimension, ...]

    def __iter__(self) -> Iterator[Dimension]:
        return iter(self.dimensions)

    def __len__(self) -> int:
        return len(self.dimensions)

    def get(self, key: str) -> Dimension | None:
        """The dimension of a key, or None."""
        return next((each for each in self if each.key == key), None)

    def contains(self, params: Mapping[str, Any]) -> bool:
        """Whether these are the values of a trial in this space."""
        searched = {each.key: each for each in self if each.is_searched(params)}
        return searched.keys() == params.keys() and all(
            searched[key].contains(value) for key, value in params.items()
        )

    def overrides(self, params: Mapping[str, Any]) -> list[Override]:
        """What sets the keys of a profile to these values. A key that is no dimension of this space
        is left out."""
        return [each.override(params[each.key]) for each in self if each.key in params]

    def row(self) -> dict[str, Any]:
        """The space as plain data, as a study records it."""
        return {each.key: each.row() for each in self}


def read_space(path: Path) -> Space:
    """Read a space file. Which keys the profile has is checked apart from that
    (:func:`apt_plugins.optuna.checking.check_space`). Raises ConfigError with all problems."""
    label = str(path)
    try:
        text = read_file(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text", "--space", label, "save it as UTF-8") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"cannot be read: {reason}", "--space", label) from None
    return parse_space(text, label)


def parse_space(text: str, label: str = "space.yaml") -> Space:
    """The space that a YAML text describes. Raises ConfigError with all problems.

    >>> space = parse_space("training: {learning_rate: {low: 1e-5, high: 1e-2, log: true}}")
    >>> [(each.key, each.low, each.kind) for each in space]
    [('training.learning_rate', 1e-05, 'float')]
    """
    document = parse_yaml(text, label)
    if not isinstance(document.data, dict) or not document.data:
        hint = "write keys of the profile, such as training.learning_rate: {low: 1e-5, high: 1e-3}"
        raise ConfigError("a space is a mapping of keys to their values", where=label, hint=hint)
    reading = _Reading(document, label)
    reading.section(document.data, (), ())
    found = reading.dimensions
    if not reading.problems and not found:
        reading.problems.append(Problem("it has no dimension", where=label))
    if len(found) > MAX_DIMENSIONS:
        message = f"{len(found):,} dimensions, and a study has at most {MAX_DIMENSIONS}"
        reading.problems.append(Problem(message, where=label))
    problems = [*reading.problems, *_conditions(found)]
    if problems:
        raise ConfigError(problems)
    return Space(tuple(_ordered(found)))


class _Reading:
    """Collects the dimensions of a document, and what is wrong with them."""

    def __init__(self, document: ParsedYaml, label: str) -> None:
        self._document, self._label = document, label
        self.dimensions: dict[str, Dimension] = {}
        self.problems: list[Problem] = list(document.problems)

    def section(self, data: Mapping[str, Any], key: tuple[str, ...], place: KeyPath) -> None:
        """Read what stands below a section; ``key`` are its names, ``place`` is where it stands,
        which differs where a name has dots."""
        for name, value in data.items():
            here, path = (*place, name), (*key, *str(name).split("."))
            if not all(part and part == part.strip() for part in path) or not is_encodable(name):
                self._wrong("is no key of a profile", here, dotted(path))
            elif isinstance(value, dict) and value and not any(mark in value for mark in MARKS):
                self.section(value, path, here)
            else:
                self._dimension(".".join(path), value, here)

    def _dimension(self, key: str, value: Any, place: KeyPath) -> None:
        if key in self.dimensions:
            self._wrong("is given twice", place, key)
            return
        if isinstance(value, list):
            value, at = {"choices": value}, place
        elif isinstance(value, dict) and value:
            at = (*place, "choices")
        else:
            hint = f"give its values: {key}: {{low: …, high: …}} or a list of choices"
            self._wrong("is a single value, which leaves nothing to search", place, key, hint)
            return
        known = CHOICES if "choices" in value else RANGE
        unknown = [name for name in value if name not in known]
        for name in unknown:
            hint = did_you_mean(str(name), known) or f"known here: {', '.join(known)}"
            self._wrong(f"{name!r} says nothing about a dimension", (*place, name), key, hint)
        if unknown:
            return
        when = self._when(value.get("when"), place, key)
        made = (
            self._choice(key, value["choices"], at, when)
            if "choices" in value
            else self._range(key, value, place, when)
        )
        if made is not None:
            self.dimensions[key] = made

    def _choice(
        self, key: str, choices: Any, place: KeyPath, when: dict[str, tuple[Any, ...]]
    ) -> Dimension | None:
        if not isinstance(choices, list) or not 2 <= len(choices) <= MAX_CHOICES:
            count = f"{len(choices):,}" if isinstance(choices, list) else "no list of them"
            hint = f"give 2 to {MAX_CHOICES:,}; a single one is set by --set"
            self._wrong(f"choices: {count}", place, key, hint)
            return None
        labels = [*map(label, choices)]
        twice = [each for i, each in enumerate(labels) if _is_in(each, labels[:i])]
        if twice:
            self._wrong(f"choices: {twice[0]!r} is there twice", place, key)
            return None
        texts = self._document.texts
        spelled = tuple(
            {path[len(place) + 1 :]: text for path, text in texts.items() if path[: len(at)] == at}
            for at in ((*place, index) for index in range(len(choices)))
        )
        where = self._where(place)
        return Dimension(key, "choice", where, choices=tuple(choices), when=when, spelled=spelled)

    def _range(
        self, key: str, value: dict[str, Any], place: KeyPath, when: dict[str, tuple[Any, ...]]
    ) -> Dimension | None:
        before = len(self.problems)
        for name in ("low", "high", "step"):
            given = value.get(name)
            if name not in value and name != "step":
                self._wrong(f"{name} is missing", place, key)
            elif given is None and name == "step":
                continue
            elif isinstance(given, bool) or not isinstance(given, int | float):
                self._wrong(f"{name}: must be a number, not {given!r}", (*place, name), key)
            elif not isfinite(given) or abs(given) > 1e300:
                self._wrong(f"{name}: must be finite, not {given!r}", (*place, name), key)
        if not isinstance(value.get("log", False), bool):
            message = f"log: must be true or false, not {value['log']!r}"
            self._wrong(message, (*place, "log"), key)
        if len(self.problems) > before:
            return None
        low, high, step, log = value["low"], value["high"], value.get("step"), value.get("log")
        if not low < high:
            hint = f"a single value is set by --set {key}={low}" if low == high else "swap them"
            self._wrong(f"low: {low:g} is not below high: {high:g}", place, key, hint)
        elif log and low <= 0:
            self._wrong(
                f"low: {low:g} has no logarithm", (*place, "low"), key, "above 0, or no log"
            )
        elif step is not None and log:
            self._wrong("step and log exclude each other", place, key, "give one of them")
        elif step is not None and not 0 < step <= high - low:
            message = f"step: {step:g} does not fit between low: {low:g} and high: {high:g}"
            self._wrong(message, (*place, "step"), key)
        else:
            whole = all(isinstance(each, int) for each in (low, high, 1 if step is None else step))
            kind: Kind = "int" if whole else "float"
            if step is not None:  # the last value of the row of steps
                high = low + int((high - low) / step + 1e-9) * step
            where = self._where(place)
            return Dimension(key, kind, where, low, high, step, bool(log), when=when)
        return None

    def _when(self, when: Any, place: KeyPath, key: str) -> dict[str, tuple[Any, ...]]:
        if when is None:
            return {}
        if not isinstance(when, dict):
            hint = "write when: {model.attention_name: tva_default}"
            self._wrong("when: must map keys to values", (*place, "when"), key, hint)
            return {}
        return {
            str(name): tuple(map(label, value if isinstance(value, list) else [value]))
            for name, value in when.items()
        }

    def _wrong(self, message: str, place: KeyPath, key: str, hint: str = "") -> None:
        self.problems.append(Problem(message, key, self._where(place), hint))

    def _where(self, place: KeyPath) -> str:
        for length in range(len(place), 0, -1):
            if place[:length] in self._document.lines:
                return f"{self._label}:{self._document.lines[place[:length]]}"
        return self._label


def _conditions(found: Mapping[str, Dimension]) -> Iterator[Problem]:
    """What is wrong with the conditions of dimensions."""
    for each in found.values():
        for key, wanted in each.when.items():
            other = found.get(key)
            if other is None:
                hint = did_you_mean(key, found) or "name a key that the space searches"
                yield Problem(f"when: {key} is no dimension", each.key, each.where, hint)
            elif never := [value for value in wanted if not other.contains(value)]:
                message = f"when: {key} is never {never[0]!r}"
                yield Problem(message, each.key, each.where, other.in_words())
        if each.key in _needed(each, found):
            yield Problem("when: it depends on itself", each.key, each.where)


def _needed(dimension: Dimension, found: Mapping[str, Dimension]) -> set[str]:
    """The keys on which a dimension depends, directly or through others."""
    needed: set[str] = set()
    waiting = [*dimension.when]
    while waiting:
        key = waiting.pop()
        if key not in needed and key in found:
            needed.add(key)
            waiting += found[key].when
    return needed


def _ordered(found: Mapping[str, Dimension]) -> Sequence[Dimension]:
    """Each after those that it depends on, otherwise as they are written."""
    return sorted(found.values(), key=lambda each: len(_needed(each, found)))


def label(value: Any) -> Any:
    """A value as a study records it: a single one as it is, a list or a mapping as its JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    import json

    return json.dumps(value, ensure_ascii=False)


def _is_same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _is_in(value: Any, values: Sequence[Any]) -> bool:
    return any(_is_same(value, each) for each in values)


def middle(dimension: Dimension) -> Any:
    """A value in the middle of a range, as a study records it.

    >>> middle(parse_space("a: {b: {low: 1e-4, high: 1e-2, log: true}}").dimensions[0])
    0.001
    """
    if dimension.kind == "choice":
        return dimension.labels[len(dimension.choices) // 2]
    low, high = dimension.low, dimension.high
    if dimension.log:
        value = 10 ** ((log10(low) + log10(high)) / 2)
    elif dimension.step:
        value = low + int((high - low) / dimension.step / 2) * dimension.step
    else:
        value = (low + high) / 2
    return round(value) if dimension.kind == "int" else float(f"{value:.12g}")


def own_values(space: Space, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The profile's own values of the dimensions, as a study records them; None where the space
    does not hold them."""
    values: dict[str, Any] = {}
    for dimension in space:
        if not dimension.is_searched(values):
            continue
        value: Any = config
        for key in dimension.key.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        values[dimension.key] = label(value)
        if not dimension.contains(values[dimension.key]):
            return None
    return values
