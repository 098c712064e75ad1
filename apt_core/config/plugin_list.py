"""Editing the ``plugins:`` list of a profile as text, so that comments and layout stay."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from apt_core.config.loader import read_profile
from apt_core.errors import ConfigError, Problem


def edit_plugin_list(profile: Path, plugin: str, *, present: bool) -> bool:
    """Add ``plugin`` to the list, or take it out; returns whether the file was changed.

    Only the lines of the list are touched. Raises ConfigError for a file that is no profile, and
    for a list that is written in a way that cannot be edited safely.
    """
    listed = read_profile(profile).data.get("plugins") or []
    if not isinstance(listed, list):
        raise ConfigError(Problem("is not a list", key="plugins", where=str(profile)))
    names = [item.get("name") if isinstance(item, dict) else item for item in listed]
    if (plugin in names) == present:
        return False
    text = profile.read_text(encoding="utf-8")
    edited = _add(text, plugin) if present else _remove(text, plugin, names.index(plugin))
    wanted = [*names, plugin] if present else [n for n in names if n != plugin]
    if _names(edited) != wanted:
        raise ConfigError(
            Problem(
                "the list cannot be edited in place (anchors, or it is inherited)",
                key="plugins",
                where=str(profile),
                hint=f"edit it by hand: plugins: [{', '.join(map(str, wanted))}]",
            )
        )
    profile.write_text(edited, encoding="utf-8")
    return True


def _node(text: str) -> yaml.SequenceNode | yaml.ScalarNode | None:
    """The node behind the key ``plugins``, if the file has the key."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == "plugins" and isinstance(value, yaml.SequenceNode | yaml.ScalarNode):
            return value
    return None


def _names(text: str) -> list[object]:
    try:
        listed = (yaml.safe_load(text) or {}).get("plugins") or []
    except (yaml.YAMLError, AttributeError):
        return []
    return [item.get("name") if isinstance(item, dict) else item for item in listed]


def _add(text: str, plugin: str) -> str:
    item = _scalar(plugin)
    node = _node(text)
    if node is None:
        newline = "" if text.endswith("\n") or not text else "\n"
        return f"{text}{newline}plugins: [{item}]\n"
    start, end = node.start_mark.index, node.end_mark.index
    if isinstance(node, yaml.ScalarNode):
        before = text[:start] if text[:start].endswith(" ") else text[:start] + " "
        return f"{before}[{item}]{text[end:]}"
    if node.flow_style:
        inner = text[start + 1 : end - 1].rstrip().rstrip(",")
        return f"{text[:start]}[{inner}{', ' if inner.strip() else ''}{item}]{text[end:]}"
    last = node.value[-1]
    line_end = text.find("\n", _content_end(text, last))
    line_end = len(text) if line_end < 0 else line_end
    indent = " " * node.value[0].start_mark.column
    dash = re.sub(r"\S.*", "", indent[:-2])
    return f"{text[:line_end]}\n{dash}- {item}{text[line_end:]}"


def _remove(text: str, plugin: str, index: int) -> str:
    node = _node(text)
    if not isinstance(node, yaml.SequenceNode):
        return text
    item = node.value[index]
    if node.flow_style:
        start, end = item.start_mark.index, item.end_mark.index
        if index + 1 < len(node.value):
            end = node.value[index + 1].start_mark.index
        elif index > 0:
            start = node.value[index - 1].end_mark.index
        return text[:start] + text[end:]
    start = text.rfind("\n", 0, item.start_mark.index) + 1
    end = text.find("\n", _content_end(text, item))
    end = len(text) if end < 0 else end + 1
    if len(node.value) == 1:
        return _empty_list(text, node, start, end)
    return text[:start] + text[end:]


def _empty_list(text: str, node: yaml.SequenceNode, start: int, end: int) -> str:
    """Replace a block list of one item by ``[]`` on the line of the key."""
    key_end = text.rfind(":", 0, node.start_mark.index) + 1
    return f"{text[:key_end]} []{text[key_end:start]}{text[end:]}"


def _content_end(text: str, node: yaml.Node) -> int:
    """The end of the node's last character: a block node's own mark runs on to the next token."""
    end = node.end_mark.index
    return node.start_mark.index + len(text[node.start_mark.index : end].rstrip())


def _scalar(value: str) -> str:
    """``value`` as YAML writes it in a list, quoted where it must be."""
    return yaml.safe_dump([value], default_flow_style=True, width=10_000).strip()[1:-1]
