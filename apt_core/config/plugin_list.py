"""Editing the ``plugins:`` list of a profile as text, so that comments and layout stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from apt_core.config.loader import read_profile
from apt_core.config.yaml_text import KeyPath, ParsedYaml, ProfileDumper, parse_yaml
from apt_core.errors import ConfigError, Problem
from apt_core.plugin_names import name_of
from apt_core.profile_paths import LOCAL_FOLDER, SUFFIXES, unrecordable, user_path

Name = Callable[[str], str]


def edit_plugin_list(profile: Path, plugin: str, *, present: bool, name_of: Name = name_of) -> bool:
    """Add ``plugin`` to the list, or take it out; returns whether the file was changed.

    Plugins are the same where ``name_of`` gives the same name. Nothing but the list is touched, to
    the byte. Raises ConfigError for a file that is no profile, and for a list that is inherited or
    written in a way that cannot be edited safely: then nothing is changed.
    """
    problems = unrecordable({"the plugin": plugin})
    if problems:
        raise ConfigError(problems)
    listed = listed_plugins(profile)
    found = [i for i, reference in enumerate(listed) if name_of(reference) == name_of(plugin)]
    if bool(found) == present:
        return False
    file = _file(profile)
    original = edited = file.read_bytes().decode("utf-8")
    if present:
        edited = _add(original, plugin)
    else:
        # From the end, so that the places of those before stay.
        for index in reversed(found):
            edited = _remove(edited, index)
    kept = [reference for i, reference in enumerate(listed) if i not in found]
    wanted = [*kept, plugin] if present else kept
    by_hand = f"edit it by hand: plugins: [{', '.join(wanted)}]"
    if listed and _nodes(original) is None:
        where = read_profile(profile).where("plugins")
        message = f"the list is inherited ({where}), so that nothing was changed"
        hint = f"{by_hand}, which replaces the inherited list"
        raise ConfigError(message, "plugins", str(file), hint)
    refused = Problem("the list cannot be edited in place", "plugins", str(file), by_hand)
    if not _is_edit(original, edited, wanted):
        raise ConfigError(refused)
    try:
        file.write_bytes(edited.encode("utf-8"))
    except OSError as error:
        reason = f"cannot be written: {(error.strerror or str(error)).lower()}"
        raise ConfigError(reason, "plugins", str(file), by_hand) from error
    if listed_plugins(profile) != wanted:
        file.write_bytes(original.encode("utf-8"))
        raise ConfigError(refused)
    return True


def listed_plugins(profile: Path) -> list[str]:
    """What the list of a profile names, in its order. Raises ConfigError if there is no list."""
    source = read_profile(profile)
    listed = source.data.get("plugins") or []
    if not isinstance(listed, list):
        raise ConfigError("is not a list", key="plugins", where=source.where("plugins"))
    return [str(_name(item)) for item in listed]


def _file(profile: Path) -> Path:
    """The file of a profile that can be read; those that come with APT are not to be edited."""
    profile = user_path(profile)
    names = [profile, *(Path(f"{profile}{suffix}") for suffix in SUFFIXES)]
    local = [LOCAL_FOLDER / name for name in names] if profile.name == str(profile) else []
    file = next((path for path in (*names, *local) if path.is_file()), None)
    if file is None:
        hint = f"write a profile of your own that says `extends: {profile}`"
        raise ConfigError(f"{profile} comes with APT and is not edited", hint=hint)
    return file


def _is_edit(original: str, edited: str, wanted: Sequence[Any]) -> bool:
    """Whether the edited text lists the wanted plugins and is otherwise equal to the original."""
    try:
        before, after = (parse_yaml(text, "profile") for text in (original, edited))
    except ConfigError:
        return False
    if before.problems != after.problems or not isinstance(after.data, dict):
        return False
    known, listed = dict(_take_listed(before)), list(_take_listed(after))
    kept = all(known.get(name, item) == item for name, item in listed)
    return kept and [name for name, _ in listed] == wanted and before.data == after.data


def _take_listed(document: ParsedYaml) -> Iterator[tuple[str, Any]]:
    """The names in a document's list as they are written, with their items. Takes the list out."""
    for index, item in enumerate(document.data.pop("plugins", None) or []):
        at: KeyPath = ("plugins", index)
        text = document.texts.get((*at, "name") if isinstance(item, dict) else at)
        yield str(_name(item) if text is None else text), item


def _name(item: Any) -> Any:
    return item.get("name") if isinstance(item, dict) else item


def _nodes(text: str) -> tuple[yaml.Node, yaml.Node] | None:
    """The nodes of the key ``plugins`` and of its value, if the file has the key."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == "plugins":
            return key, value
    return None


def _add(text: str, plugin: str) -> str:
    dumped = yaml.dump(
        [plugin], Dumper=ProfileDumper, default_flow_style=True, allow_unicode=True, width=10_000
    )
    item = dumped.strip()[1:-1]
    newline = "\r\n" if "\r\n" in text else "\n"
    nodes = _nodes(text)
    if nodes is None:
        gap = "" if text.endswith("\n") or not text else newline
        return f"{text}{gap}plugins: [{item}]{newline}"
    key, node = nodes
    if isinstance(node, yaml.ScalarNode):
        colon = _colon(text, key)
        return f"{text[:colon]} [{item}]{text[max(colon, node.end_mark.index) :]}"
    if isinstance(node, yaml.SequenceNode) and node.flow_style:
        end = _end(node.value[-1]) if node.value else node.start_mark.index + 1
        return f"{text[:end]}{', ' if node.value else ''}{item}{text[end:]}"
    end = _line_end(text, _end(node.value[-1]))
    return f"{text[:end]}{newline}{' ' * node.start_mark.column}- {item}{text[end:]}"


def _remove(text: str, index: int) -> str:
    key, node = _nodes(text) or (None, None)
    if key is None or not isinstance(node, yaml.SequenceNode):
        return text
    item = node.value[index]
    if node.flow_style:
        return _remove_from_flow(text, node.value, index)
    start = text.rfind("\n", 0, item.start_mark.index) + 1
    end = _line_end(text, _end(item))
    if len(node.value) == 1:
        # Without an item the key would say null, so that the list is written on its line.
        colon = _colon(text, key)
        text, start, end = f"{text[:colon]} []{text[colon:]}", start + 3, end + 3
    return text[:start] + text[_past_newline(text, end) :]


def _remove_from_flow(text: str, items: Sequence[yaml.Node], index: int) -> str:
    start, end = items[index].start_mark.index, _end(items[index])
    line_start = text.rfind("\n", 0, start) + 1
    alone = re.compile(r"[ \t]*,?[ \t]*(#[^\r\n]*)?\r?\n").match(text, end)
    if alone and not text[line_start:start].strip():
        return text[:line_start] + text[alone.end() :]
    if index:
        before = _end(items[index - 1])
        if "#" not in text[before:start]:
            return text[:before] + text[end:]
    comma = re.compile(r"[ \t]*,[ \t]*").match(text, end)
    return text[:start] + text[comma.end() if comma else end :]


def _colon(text: str, key: yaml.Node) -> int:
    """The place behind the ':' of a key."""
    return text.index(":", key.end_mark.index) + 1


def _end(node: yaml.Node) -> int:
    """The end of a node's last character: a block node's own mark runs on to the next token."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _line_end(text: str, place: int) -> int:
    """The end of the line around a place, before what ends it."""
    found = re.compile(r"\r?\n|$").search(text, place)
    return found.start() if found else len(text)


def _past_newline(text: str, place: int) -> int:
    found = re.compile(r"\r?\n").match(text, place)
    return found.end() if found else place
