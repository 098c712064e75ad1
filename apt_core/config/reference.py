"""Every key of the profile as Markdown tables, from the schema itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from apt_core.config.json_schema import json_schema, mask_defaults
from apt_core.types import SectionSpec

HEAD = "| key | value | default | meaning |\n|---|---|---|---|\n"
TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "`true` or `false`",
    "object": "mapping",
    "array": "list",
}
SHOWN_BOUND, EXPLAINED_BOUND = 1000, 2**25
"""Bounds beyond it only keep sizes within what a machine can count; those of a key by itself are
shown up to the second."""


ITEM = "an entry of "


@dataclass(frozen=True)
class KeyFacts:
    """What the schema says of one key: ``value`` is what may be written, in words, ``default`` as
    JSON has it (None where there is none). A section has its ``keys``, and ``owner``, the text of
    its model; a key has the path of its ``section``."""

    path: str
    section: str
    value: str
    meaning: str
    default: Any = None
    required: bool = False
    owner: str = ""
    keys: tuple[KeyFacts, ...] = ()


def describe_key(sections: Sequence[SectionSpec], path: Sequence[str]) -> KeyFacts | None:
    """The facts of a key, or of a section, those of plugins included; None if there is no such key.

    The number of an item of a list may be left out: ``data.mixture.weight`` is the key of any.
    """
    schema = json_schema(sections)
    definitions: dict[str, Any] = schema["$defs"]
    facts = KeyFacts("", "", "mapping", "", keys=_keys_of("", schema, definitions))
    section: dict[str, Any] | None = schema
    rest = [key.partition("[")[0] for key in path]
    at = ""
    while rest:
        if section is None:
            return None
        key, entry = rest[0], section.get("properties", {}).get(rest[0])
        if entry is None:
            entry = section.get("additionalProperties")
            if not isinstance(entry, dict):
                return None
        required = key in section.get("required", ())
        facts = _facts(f"{at}.{key}".lstrip("."), at, entry, definitions, required=required)
        at, section, rest = facts.path, _inner(entry, definitions), rest[1:]
    return facts


def describe_settings(model: type[BaseModel], section: str) -> tuple[KeyFacts, ...]:
    """The facts of the settings of a provider or a plugin, which stand in ``section``."""
    schema = model.model_json_schema()
    mask_defaults(schema)
    return _keys_of(section, schema, schema.get("$defs", {}))


def _inner(entry: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The mapping that the keys below an entry are of: a section, one that is an item of a list, or
    a mapping with any keys."""
    found = _section_of(entry, definitions)
    if found is not None or isinstance(entry.get("additionalProperties"), dict):
        return found or entry
    items = entry.get("items")
    for option in [items] if isinstance(items, dict) else entry.get("anyOf", ()):
        inner = _inner(option, definitions)
        if inner is not None:
            return inner
    return None


def _facts(
    path: str, section: str, entry: dict[str, Any], definitions: dict[str, Any], *, required: bool
) -> KeyFacts:
    inner = _inner(entry, definitions)
    return KeyFacts(
        path,
        section,
        _value(entry, definitions, EXPLAINED_BOUND),
        entry.get("description", "") or (inner or {}).get("description", ""),
        entry.get("default"),
        required,
        (inner or {}).get("description", ""),
        () if inner is None else _keys_of(path, inner, definitions),
    )


def _keys_of(
    path: str, section: dict[str, Any], definitions: dict[str, Any]
) -> tuple[KeyFacts, ...]:
    """The facts of the keys of a section, without what is below them."""
    return tuple(
        KeyFacts(
            f"{path}.{key}".lstrip("."),
            path,
            "section"
            if _section_of(entry, definitions)
            else _value(entry, definitions, EXPLAINED_BOUND),
            entry.get("description", ""),
            entry.get("default"),
            key in section.get("required", ()),
        )
        for key, entry in section.get("properties", {}).items()
    )


def profile_reference(sections: Sequence[SectionSpec] = ()) -> str:
    """One table a section, those of plugins included; keys at the top of the profile first."""
    return "\n".join(
        f"### {path or 'Top of the profile'}\n\n{table}"
        for path, table in settings_tables(json_schema(sections))
    )


def settings_tables(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A table of keys for a section and for each that stands in it, by their dotted paths."""
    definitions: dict[str, Any] = schema.get("$defs", {})
    for path, section in _sections("", schema, definitions):
        required = section.get("required", ())
        rows = [
            _row(key, entry, definitions, required=key in required)
            for key, entry in section["properties"].items()
            if _section_of(entry, definitions) is None
        ]
        if rows:
            yield path, f"{HEAD}{''.join(rows)}"


def all_keys(sections: Sequence[SectionSpec] = ()) -> list[str]:
    """The dotted names of all keys, those of plugins included; without those of items of lists."""
    schema = json_schema(sections)
    definitions: dict[str, Any] = schema["$defs"]
    return [
        f"{path}.{key}".lstrip(".")
        for path, section in _sections("", schema, definitions)
        if not path.startswith(ITEM)
        for key, entry in section["properties"].items()
        if _section_of(entry, definitions) is None
    ]


def _sections(
    path: str, section: dict[str, Any], definitions: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A section, and all that stand in it, by their dotted paths."""
    yield path, section
    for key, entry in section["properties"].items():
        below = f"{path}.{key}".lstrip(".")
        inner = _section_of(entry, definitions)
        if inner is not None:
            yield from _sections(below, inner, definitions)
        for option in [entry, *entry.get("anyOf", ())] if inner is None else ():
            values = option.get("items", option.get("additionalProperties"))
            for value in values.get("anyOf", [values]) if isinstance(values, dict) else ():
                inner = _section_of(value, definitions)
                if inner is not None:
                    yield from _sections(f"{ITEM}{below}", inner, definitions)


def _section_of(entry: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The section behind an entry, if it is one: a mapping whose keys are known."""
    for option in [entry, *entry.get("anyOf", ()), *entry.get("allOf", ())]:
        reference = option.get("$ref", "")
        found: dict[str, Any] = definitions.get(reference.removeprefix("#/$defs/"), option)
        if "properties" in found:
            return found
    return None


def _row(key: str, entry: dict[str, Any], definitions: dict[str, Any], *, required: bool) -> str:
    default = "needed" if required else "–"
    if entry.get("default") not in (None, "", []):
        default = f"`{json.dumps(entry['default'], ensure_ascii=False)}`".replace('"', "")
    meaning = entry.get("description", "").replace("|", "\\|")
    return f"| `{key}` | {_value(entry, definitions)} | {default} | {meaning} |\n"


def _value(
    entry: dict[str, Any], definitions: dict[str, Any], shown_bound: float = SHOWN_BOUND
) -> str:
    """What may be written, in words, with its bounds below ``shown_bound``."""
    options = [option for option in entry.get("anyOf", ()) if option.get("type") != "null"]
    if options:
        return " or ".join(
            dict.fromkeys(_value(option, definitions, shown_bound) for option in options)
        )
    if "$ref" in entry:
        return "mapping"
    choices = entry.get("enum", [entry["const"]] if "const" in entry else None)
    if choices:
        return ", ".join(f"`{json.dumps(choice)}`".replace('"', "") for choice in choices)
    if "prefixItems" in entry:
        return f"list of {len(entry['prefixItems'])} numbers"
    words = TYPES.get(entry.get("type", ""), "anything")
    inner = entry.get("items") or entry.get("additionalProperties")
    if isinstance(inner, dict):
        of = _value(inner, definitions, shown_bound)
        return f"{words} of {of}" if " or " not in of else words
    return words + _bounds(entry, shown_bound)


def _bounds(entry: dict[str, Any], shown_bound: float) -> str:
    words = (
        ("minimum", "≥"),
        ("exclusiveMinimum", ">"),
        ("maximum", "≤"),
        ("exclusiveMaximum", "<"),
    )
    shown = [
        f"{sign} {entry[name]:g}"
        for name, sign in words
        if name in entry and abs(entry[name]) < shown_bound
    ]
    return f" {', '.join(shown)}" if shown else ""
