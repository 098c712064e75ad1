"""Parses YAML to plain data with the line of every key, within bounds of size and depth."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import yaml
from yaml.reader import ReaderError

from apt_core.errors import ConfigError, Problem

KeyPath = tuple[str | int, ...]

MAX_DEPTH = 40
MAX_NODES = 50_000
MAX_CHARACTERS = 1_000_000
LARGER = "larger than 1 MB, which no profile is"
MAX_DIGITS = 400

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(?:0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+|[0-9][0-9_]*)$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*"
    r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
_BOOLS = {"yes": True, "no": False, "true": True, "false": False, "on": True, "off": False}
_BASES = {"0x": 16, "0o": 8, "0b": 2}

_PLAIN_WORDS = (
    (r"found character '\t'", "a tab: indent with spaces"),
    ("mapping values are not allowed", "a ':' cannot stand here: check the indentation, or quote"),
    ("could not find expected ':'", "a key without ':'"),
    ("expected <block end>", "the indentation does not fit the lines above"),
    ("unindent does not match", "the indentation does not fit the lines above"),
    ("expected ',' or ']'", "a list that '[' opens is not closed, or a ',' is missing"),
    ("expected ',' or '}'", "a mapping that '{' opens is not closed, or a ',' is missing"),
    ("unexpected end of stream", "a quote that is never closed"),
    ("found another document", "more than one document ('---'): keep one"),
)


class ProfileLoader(yaml.SafeLoader):
    """Loads plain data only: ``3e-5`` is a float, ``010`` is 10, dates and ``1:30`` are text."""

    depth = 0
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        if self.nodes > MAX_NODES:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            problem = f"more than {MAX_NODES:,} keys and values"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        if self.depth > MAX_DEPTH:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            problem = f"nested more than {MAX_DEPTH} deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class ProfileDumper(yaml.SafeDumper):
    """Quotes every text that the loader or another YAML reader would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: ProfileDumper, text: str) -> yaml.ScalarNode:
    # Unless double-quoted, PyYAML writes these line ends as they are, and folds them on reading.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


ProfileDumper.add_representer(str, _represent_text)

_OWN = {f"{_TAG}int", f"{_TAG}float", f"{_TAG}timestamp"}
ProfileLoader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in _OWN]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (ProfileLoader, ProfileDumper):
    _class.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
    _class.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


@dataclass
class ParsedYaml:
    """A parsed text: its ``data``, the line of every path, and problems that do not stop parsing.

    ``texts`` holds the spelling of each scalar (None for a null, a list or a mapping), ``bare`` the
    paths of keys without a value.
    """

    data: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    texts: dict[KeyPath, str | None] = field(default_factory=dict)
    bare: set[KeyPath] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)


def yaml_of(data: Mapping[str, Any]) -> str:
    """A profile's YAML, of what JSON can hold. It is made once for several checkpoints."""
    return _yaml_of(json.dumps(data))


@lru_cache(maxsize=4)
def _yaml_of(text: str) -> str:
    data = json.loads(text)
    return yaml.dump(data, Dumper=ProfileDumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, label: str) -> ParsedYaml:
    """Parse one YAML document. ``label`` names the text in messages.

    Raises ConfigError for a syntax error (with line and column), a recursive or exploding alias,
    a tag that is not plain data, and more than MAX_CHARACTERS, MAX_NODES or MAX_DEPTH. The result's
    ``problems`` collects duplicate keys and keys that are lists or mappings.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(LARGER, where=label)
    try:
        loader = ProfileLoader(text)
    except ReaderError as error:
        before = text[: error.position]
        where = f"{label}:{before.count(chr(10)) + 1}:{error.position - before.rfind(chr(10))}"
        message = f"the character {text[error.position]!a} cannot stand in YAML"
        raise ConfigError(message, where=where) from None
    try:
        return _Builder(label).document(loader.get_single_node())
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_problem(error, label)) from None
    except (ValueError, OverflowError) as error:
        # PyYAML passes an escape such as \UFFFFFFFF to chr() unchecked.
        where = f"{label}:{loader.line + 1}:{loader.column + 1}"
        raise ConfigError(f"invalid escape: {error}", where=where) from None
    finally:
        loader.dispose()


def _syntax_problem(error: yaml.MarkedYAMLError, label: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    where = f"{label}:{mark.line + 1}:{mark.column + 1}" if mark else label
    raw = error.problem or error.context or "cannot be read"
    plain = next((text for words, text in _PLAIN_WORDS if words in raw), raw)
    return Problem(f"YAML syntax: {plain}", where=where)


class _Builder:
    """Converts nodes to data. It counts values, since the loader counts an alias as one node."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.result = ParsedYaml()
        self.count = 0
        self.open: list[int] = []

    def document(self, node: yaml.Node | None) -> ParsedYaml:
        if node is not None:
            self.result.data = self.build(node, ())
        return self.result

    def fail(self, node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.count += 1
        if self.count > MAX_NODES:
            raise self.fail(node, f"aliases expand to more than {MAX_NODES:,} values")
        if id(node) in self.open:
            raise self.fail(node, "an alias is inside of the value that it names")
        if len(path) > MAX_DEPTH:
            raise self.fail(node, f"nested more than {MAX_DEPTH} deep")
        self.result.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            value = self.scalar(node)
            if value is None and not node.value:
                self.result.bare.add(path)
            # The first counts: a mapping's own keys override those that '<<' merges.
            self.result.texts.setdefault(path, None if value is None else node.value)
            return value
        self.result.texts.setdefault(path, None)
        if node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
            raise self.fail(node, f"the tag {node.tag!r} is not plain data")
        self.open.append(id(node))
        if isinstance(node, yaml.MappingNode):
            data: Any = self.mapping(node, path)
        else:
            data = [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        self.open.pop()
        return data

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        first_line: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == f"{_TAG}merge":
                merged.append(value_node)
                continue
            key = self.key(key_node)
            if key is None:
                continue
            if key in first_line:
                self.problem(
                    f"given twice, on line {first_line[key]} and on line {line}",
                    (*path, key),
                    line,
                    "keep one of them",
                )
                continue
            first_line[key] = line
            self.result.lines[(*path, key)] = line
            data[key] = self.build(value_node, (*path, key))
        inherited: dict[str, Any] = {}
        for value_node in merged:
            for mapping in self.merge_sources(value_node, path):
                for name, value in mapping.items():
                    inherited.setdefault(name, value)
        return inherited | data

    def merge_sources(self, node: yaml.Node, path: KeyPath) -> list[dict[str, Any]]:
        value = self.build(node, path)
        sources = value if isinstance(value, list) else [value]
        if not all(isinstance(source, dict) for source in sources):
            raise self.fail(node, "'<<' merges mappings only")
        return sources

    def key(self, node: yaml.Node) -> str | None:
        """The key as written (also ``no:`` or ``1:``), or None for a list or mapping."""
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode):
            self.problem("a key must be a word, not a list or a mapping", (), line, "")
            return None
        if not is_encodable(node.value):
            raise self.fail(node, "half a surrogate pair is no character")
        return str(node.value)

    def problem(self, message: str, path: KeyPath, line: int, hint: str) -> None:
        where = f"{self.label}:{line}"
        self.result.problems.append(Problem(message, dotted(path), where, hint))

    def scalar(self, node: yaml.ScalarNode) -> Any:
        text: str = node.value
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            if not is_encodable(text):
                raise self.fail(node, "half a surrogate pair is no character")
            return text
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in _BOOLS:
            return _BOOLS[text.lower()]
        if kind == "int" and _INT.match(text):
            digits = text.lstrip("+-").replace("_", "")
            if len(digits) > MAX_DIGITS:
                raise self.fail(node, f"a number of {len(digits)} digits")
            value = int(digits, _BASES.get(digits[:2], 10))
            return -value if text.startswith("-") else value
        if kind == "float" and (_FLOAT.match(text) or _INT.match(text)):
            return float(
                text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan")
            )
        raise self.fail(node, f"{text[:60]!r} with the tag {node.tag!r} is not plain data")


def is_encodable(text: str) -> bool:
    """Whether ``text`` has no lone surrogate."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def dotted(path: KeyPath) -> str:
    """``path`` in dotted notation: ``plugins[0].priority``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
