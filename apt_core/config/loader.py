"""Finding and reading profiles: a path, ``./profiles``, or the profiles that come with APT."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from apt_core.config.overrides import Override
from apt_core.config.schema import PLACEHOLDERS, Config
from apt_core.config.source import Source, from_document
from apt_core.config.yaml_text import LARGER, MAX_CHARACTERS, parse_yaml
from apt_core.errors import ConfigError, did_you_mean
from apt_core.files import read_file
from apt_core.profile_paths import INSTALLED_FOLDER, LOCAL_FOLDER, SUFFIXES, list_profiles

MAX_PARENTS = 20


@dataclass(frozen=True)
class _File:
    """A profile that was found. ``label`` is how messages name it, ``folder`` where it lies."""

    file: Path
    label: str
    folder: Path

    @property
    def stem(self) -> str:
        return self.file.name.rsplit(".", 1)[0] or self.file.name

    @property
    def identity(self) -> str:
        return os.path.realpath(self.file)


def read_profile(profile: str | Path, overrides: Sequence[Override] = ()) -> Source:
    """Read a profile, all that it extends, and the overrides on top.

    ``profile`` is a path, or a name found in ``./profiles`` or among those that come with APT;
    ``.yaml`` may be left off. Raises ConfigError if it, or a profile that it extends, is missing
    or cannot be read. What can be gone on from is in the result's ``problems``.
    """
    found = _find(str(profile), folder=None, skip=frozenset())
    return core_text(_read(found, chain=()).with_overrides(overrides))


def core_text(source: Source) -> Source:
    """The source with the text of the core's own sections as it was written. That of plugins'
    comes when it is checked: until then it is not known what they are."""
    return source.with_text(Config, skip=PLACEHOLDERS)


def _read(found: _File, chain: tuple[_File, ...]) -> Source:
    if any(found.identity == earlier.identity for earlier in chain):
        names = " -> ".join(file.label for file in (*chain, found))
        raise ConfigError(f"profiles extend each other in a circle: {names}", "extends")
    if len(chain) >= MAX_PARENTS:
        raise ConfigError(f"more than {MAX_PARENTS} profiles extend each other", "extends")
    document = parse_yaml(_text_of(found), found.label)
    if document.data is None:
        hint = "`extends: base` alone is a complete profile"
        raise ConfigError("the profile is empty", where=found.label, hint=hint)
    if not isinstance(document.data, dict):
        kind = "a list" if isinstance(document.data, list) else "a single value"
        hint = "write sections such as `model:` and `training:`"
        raise ConfigError(
            f"a profile is a mapping of sections, not {kind}", where=found.label, hint=hint
        )
    source = from_document(document, found.stem, found.label, found.folder)
    parent = source.data.pop("extends", None)
    parent = source.marks.texts.get(("extends",)) or parent
    if parent is None:
        return replace(source, recorded=_is_of_a_run(found.file))
    where = source.where("extends")
    if not isinstance(parent, str) or not parent:
        raise ConfigError("must be the name or path of one profile", "extends", where)
    # A bare name never means the file itself: ./profiles/base.yaml may extend APT's own base.
    skip = frozenset({found.identity}) if _is_bare(parent) else frozenset()
    try:
        above = _find(parent, folder=found.folder, skip=skip)
    except ConfigError as error:
        problem = error.problems[0]
        raise ConfigError(problem.message, "extends", where, problem.hint) from None
    return _read(above, (*chain, found)).inherited().below(source)


def _is_of_a_run(file: Path) -> bool:
    """Whether ``file`` is the profile that a run, or a checkpoint, has written."""
    return file.name == "profile.yaml" and (file.parent / "manifest.json").is_file()


def _text_of(found: _File) -> str:
    try:
        raw = read_file(found.file, 4 * MAX_CHARACTERS)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        if error.errno == errno.EFBIG:
            reason = LARGER
        raise ConfigError(f"cannot be read: {reason}", where=found.label) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(
            "not UTF-8 text", where=f"{found.label}:{line}", hint="save it as UTF-8"
        ) from None


def _find(profile: str, folder: Path | None, skip: frozenset[str]) -> _File:
    """``folder`` is that of the profile which extends this one, if one does."""
    looked: list[str] = []
    directory = ""
    for candidate in _candidates(profile, folder):
        looked.append(candidate.label)
        if candidate.identity in skip:
            continue
        if os.path.isdir(candidate.file):
            directory = directory or candidate.label
        elif os.path.lexists(candidate.file):  # reading a pipe or a broken link says why not
            return candidate
    if directory:
        raise ConfigError(f"{profile!r} is a directory, not a profile", where=directory)
    known = list_profiles()
    stem = Path(profile).name.removesuffix(".yaml").removesuffix(".yml")
    beside = {Path(name).stem: name for name in _profiles_beside(profile, folder)}
    near = difflib.get_close_matches(stem, beside, n=1)
    hint = "" if stem in beside else did_you_mean(stem, known)
    hint = hint or (f"did you mean {beside[near[0]]!r}?" if near else "")
    hint = hint or f"known profiles: {', '.join(known)}"
    raise ConfigError(
        f"no profile {profile!r}; looked for {', '.join(dict.fromkeys(looked))}", hint=hint
    )


def _profiles_beside(profile: str, folder: Path | None) -> list[str]:
    """The profiles in the folder that a path leads to, as the path would name them."""
    place = Path(os.path.expanduser(profile)).parent
    try:
        names = sorted(os.listdir((folder or Path()) / place))
    except (OSError, ValueError):
        return []
    return [str(place / name) for name in names if name.endswith(SUFFIXES)]


def _candidates(profile: str, folder: Path | None) -> Iterator[_File]:
    if not profile or "\0" in profile:
        raise ConfigError(f"{profile!r} is no profile", hint="give a name or a path")
    names = [profile]
    if not profile.endswith(SUFFIXES):
        names += [f"{profile}{suffix}" for suffix in SUFFIXES]
    folders = [folder or Path()]
    folders += [LOCAL_FOLDER, INSTALLED_FOLDER] if _is_bare(profile) else [Path()]
    for base in folders:
        for name in names:
            file = base / os.path.expanduser(name)
            yield _File(file, _label(file), file.parent)


def _is_bare(profile: str) -> bool:
    return not any(separator in profile for separator in ("/", os.sep)) and profile not in (
        ".",
        "..",
    )


def _label(file: Path) -> str:
    """The path, relative if it is below the working directory."""
    try:
        return str(file.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError, RuntimeError):
        return str(file)
