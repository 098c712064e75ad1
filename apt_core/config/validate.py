"""Validates a profile as written to a Config, and reports all problems at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from apt_core.config.checks import find_contradictions
from apt_core.config.inactive import inactive_by_rule
from apt_core.config.messages import KnownKeys, ignored_keys, problem_of
from apt_core.config.schema import PLACEHOLDERS, Config
from apt_core.config.secret_fields import secret_places
from apt_core.config.source import InactiveKey, Source
from apt_core.config.text_keys import TextKeys
from apt_core.config.yaml_text import KeyPath, dotted
from apt_core.error_text import one_line
from apt_core.errors import ConfigError, Problem
from apt_core.profile_paths import resolve_paths
from apt_core.secrets import SecretValues, hidden_in, named_secrets
from apt_core.section_errors import describe
from apt_core.types import SectionSpec

_ABSENT = object()
_UNOWNED = "no active plugin owns this section"
_CORE = KnownKeys(Config, {}).children


@dataclass(frozen=True)
class Validated:
    """``config`` is there if there is no problem. ``inactive`` keys are valid and do nothing,
    ``notices`` are facts that the person should see, ``secrets`` what no text may show, and
    ``unknown`` the keys that no section has which was asked."""

    config: Config | None
    problems: list[Problem]
    inactive: list[InactiveKey]
    notices: list[str]
    secrets: SecretValues
    unknown: list[KeyPath]

    def require(self) -> Config:
        """The config. Raises ConfigError with every problem if there is none."""
        if self.config is None:
            raise ConfigError(self.problems)
        return self.config


def validate(
    source: Source,
    sections: Sequence[SectionSpec] = (),
    inert: Mapping[str, str] | None = None,
    *,
    active: Collection[str] | None = None,
    available: Sequence[SectionSpec] = (),
    lenient: bool = False,
) -> Validated:
    """Check a whole profile; bad input never raises.

    ``sections`` are those of plugins, which validate what is written there. ``inert`` maps a
    section of a plugin that was left out to the reason: its keys are inactive, not unknown.
    ``active`` are the names of the active plugins, by default those that the profile names.
    ``available`` are the sections of plugins that are not active: what is written there is checked,
    and inactive. With ``lenient``, a plugin was left out that could not be asked, so that a section
    which nobody knows may be its: it is inactive.
    """
    owned, spec_problems = _owned_sections(sections)
    inert = inert or {}
    waiting = _waiting_sections(available, {*owned, *inert})
    models = {**{path: spec.model for path, spec in waiting.items() if spec.model}, **owned}
    secrets = SecretValues()
    secrets.add(named_secrets(source.data))
    problems = [*source.problems, *spec_problems]
    known = KnownKeys(Config, models, source)
    data, wrong = _with_text(source, models)
    problems += wrong.values()
    resolve_paths(data, source.folder_of)
    inactive = list(source.inactive)
    for path, reason in inert.items():
        if _is_core(path) or path in owned:
            continue
        if _cut(data, path.split(".")) is not _ABSENT:
            inactive.append(InactiveKey(path, reason))

    parts: dict[str, BaseModel] = {}
    containers = _containers({*models, *inert}) - set(models)
    # The innermost first: a section may stand within another plugin's.
    for path in sorted({*models, *containers}, key=lambda path: (-path.count("."), path)):
        written = _cut(data, path.split("."))
        if path in containers:
            problems += _leftovers(written, path, source, known)
            continue
        if path in waiting and (written is _ABSENT or written is None):
            continue
        secrets.add(value for _, value in secret_places(models[path], written))
        part, found = _validate_part(models[path], written, path, source, known)
        problems += found
        if part is not None and path in owned:
            parts[path] = part
        elif part is not None and getattr(part, "enabled", True) is not False:
            reason = ": ".join(filter(None, (_UNOWNED, waiting[path].without)))
            inactive.append(InactiveKey(path, reason, unclaimed=True))
    for place in [*_foreign_sections(data, known)] if lenient else ():
        if known.meant(place) is None:
            _cut(data, place)
            reason = f"{_UNOWNED}; one that is blocked or broken may"
            inactive.append(InactiveKey(dotted(place), reason, unclaimed=True))

    data.setdefault("name", source.name)
    config, found, bad = _validate_core(data, source, known)
    problems += found
    problems += find_contradictions(config, source, {*bad, *wrong})
    names = {request.name for request in config.plugins} if active is None else active
    inactive += inactive_by_rule(config, names, owned)
    problems = list(dict.fromkeys(problems))
    config = config.with_plugin_sections(parts)
    secrets.add(hidden_in(config.to_dict(secrets=True), config.to_dict()))
    checked = None if problems else config
    return Validated(checked, problems, inactive, list(source.notices), secrets, known.unknown)


def parse_config(profile: Mapping[str, Any], *, sections: Sequence[SectionSpec] = ()) -> Config:
    """Validate a plain mapping, with the sections of plugins. Raises ConfigError with every
    problem.

    >>> parse_config({"model": {"d_model": 64}}).model.d_model
    64
    """
    return validate(Source.from_dict(profile), sections).require()


def _with_text(
    source: Source, owned: Mapping[str, type[BaseModel]]
) -> tuple[dict[str, Any], dict[KeyPath, Problem]]:
    """The data with its text as written, and what is wrong with values that are no text: those
    are taken out."""
    keys = TextKeys(source.marks.texts)
    data = keys.section(_copy(source.data), Config, skip=owned)
    for section, model in owned.items():
        *around, last = section.split(".")
        place: Any = data
        for key in around:
            place = place.get(key) if isinstance(place, dict) else None
        if isinstance(place, dict) and last in place:
            place[last] = keys.section(place[last], model, (*around, last))
    wrong = {path: found for path, found in source.marks.wrong.items() if path not in keys.found}
    for path in wrong:
        _cut(data, tuple(map(str, path)))
    return data, wrong


def _owned_sections(
    sections: Sequence[SectionSpec],
) -> tuple[dict[str, type[BaseModel]], list[Problem]]:
    owned: dict[str, type[BaseModel]] = {}
    problems = []
    for spec in sections:
        if not spec.path or spec.model is None:
            continue
        if _is_core(spec.path):
            problems.append(Problem("a plugin declares a section of the core", spec.path))
        elif spec.path in owned:
            problems.append(Problem("two plugins declare this section", spec.path))
        else:
            owned[spec.path] = spec.model
    return owned, problems


def _waiting_sections(
    available: Sequence[SectionSpec], taken: Collection[str]
) -> dict[str, SectionSpec]:
    """The sections of plugins that are not active, by path; the first, where two have the same."""
    return {
        spec.path: spec
        for spec in reversed(available)
        if spec.path and spec.model is not None and spec.path not in taken
        if not _is_core(spec.path)
    }


def _foreign_sections(
    data: Any, known: KnownKeys, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """The unknown sections in the data."""
    for key, value in data.items():
        here = (*path, key)
        if not isinstance(value, dict):
            continue
        if key not in known.children[dotted(path)]:
            yield here
        elif dotted(here) in known.children:
            yield from _foreign_sections(value, known, here)


def _is_core(path: str) -> bool:
    """Whether the core has a key there that no plugin may take over."""
    section, _, key = path.rpartition(".")
    known = key in _CORE.get(section, ()) or section in ("plugins", "schedules")
    return known and path not in PLACEHOLDERS


def _containers(paths: Collection[str]) -> set[str]:
    """Paths that only contain sections of plugins, such as ``mine`` of ``mine.part``."""
    keys = [path.split(".") for path in paths]
    around = {".".join(path[:end]) for path in keys for end in range(1, len(path))}
    return around - set(_CORE) - set(Config.model_fields)


def _leftovers(written: Any, path: str, source: Source, known: KnownKeys) -> Iterator[Problem]:
    """What is left in a container once the sections are cut out: nothing is known there."""
    at = tuple(path.split("."))
    if isinstance(written, dict):
        yield from (known.problem((*at, key), source) for key in written)
    elif written is not _ABSENT and written is not None:
        message = f"must be a section with keys, not {describe(written)}"
        yield Problem(message, path, source.where(at))


def _validate_core(
    data: dict[str, Any], source: Source, known: KnownKeys
) -> tuple[Config, list[Problem], set[KeyPath]]:
    """The core's part. What is wrong is dropped, so that the rest can still be checked; the third
    value are the paths whose values are not known therefore."""
    problems: list[Problem] = []
    bad: set[KeyPath] = set()
    while True:
        try:
            return Config.model_validate(data), problems, bad
        except ValidationError as error:
            located = list(_located(error, data, (), source, known))
        problems += [problem for _, problem in located]
        paths = [path for path, _ in located]
        bad.update(paths)
        bad.update(meant for path in paths if (meant := known.meant(path)) is not None)
        for target in {_droppable(data, path) for path in paths}:
            _cut(data, target)


def _validate_part(
    model: type[BaseModel], written: Any, path: str, source: Source, known: KnownKeys
) -> tuple[BaseModel | None, list[Problem]]:
    """A plugin's section; where nothing is written, its defaults."""
    at = tuple(path.split("."))
    data = {} if written is _ABSENT or written is None else written
    unknown = [known.problem(key, source) for key in ignored_keys(model, data, at)]
    try:
        part = model.model_validate(data)
    except ValidationError as error:
        hidden = [place for place, _ in secret_places(model, data, at)]
        found = [problem for _, problem in _located(error, data, at, source, known, hidden)]
        return None, list(dict.fromkeys([*unknown, *found]))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the validators of a plugin's model are foreign code
        message = f"the plugin's own check failed: {one_line(error)}"
        return None, [*unknown, Problem(message, path, source.where(at))]
    return part, unknown


def _located(
    error: ValidationError,
    data: Any,
    prefix: KeyPath,
    source: Source,
    known: KnownKeys,
    hidden: Sequence[KeyPath] = (),
) -> Iterator[tuple[KeyPath, Problem]]:
    """pydantic's errors with their paths in the profile, the first at each path only: a union
    reports one for each of its members. What is at the paths ``hidden`` is not shown."""
    seen: set[KeyPath] = set()
    for details in error.errors(include_url=False):
        path = _path_within(details["loc"], data, missing=details["type"] == "missing")
        if path in seen:
            continue
        seen.add(path)
        full = (*prefix, *path)
        if details["type"] == "extra_forbidden":
            yield path, known.problem(full, source)
        else:
            secret = any(full[: len(place)] == place for place in hidden)
            yield path, problem_of(details, full, source, secret=secret)


def _path_within(location: Sequence[str | int], data: Any, *, missing: bool) -> KeyPath:
    """The part of pydantic's location that leads through the data: it also names union members."""
    path: list[str | int] = []
    for index, part in enumerate(location):
        inside = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if inside:
            data = data[part]
            path.append(part)
        elif missing and index == len(location) - 1:
            path.append(part)
    return tuple(path)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _cut(data: Any, path: Sequence[str]) -> Any:
    """Take the value at a path out of ``data``."""
    for key in path[:-1]:
        data = data.get(key) if isinstance(data, dict) else None
    return data.pop(path[-1], _ABSENT) if isinstance(data, dict) else _ABSENT


def _droppable(data: dict[str, Any], path: KeyPath) -> tuple[str, ...]:
    """What to take out for a problem at ``path``. An item of a list takes the list with it, since
    the others would change their places; a missing key takes the section that lacks it."""
    keys: list[str] = []
    section: Any = data
    for key in path:
        if not isinstance(key, str) or not isinstance(section, dict) or key not in section:
            break
        section = section[key]
        keys.append(key)
    assert keys, "every key of the root has a default"
    # A ramp is taken out whole: without one of its keys it would be another ramp.
    return tuple(keys[:2] if keys[0] == "schedules" else keys)
