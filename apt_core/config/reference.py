"""Every key of the profile as Markdown tables, from the schema itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from apt_core.config.json_schema import json_schema
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
SHOWN_BOUND = 1000
"""Bounds beyond it only keep sizes within what a machine can count."""


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
                    yield from _sections(f"an entry of {below}", inner, definitions)


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


def _value(entry: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What may be written, in words."""
    options = [option for option in entry.get("anyOf", ()) if option.get("type") != "null"]
    if options:
        return " or ".join(dict.fromkeys(_value(option, definitions) for option in options))
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
        of = _value(inner, definitions)
        return f"{words} of {of}" if " or " not in of else words
    return words + _bounds(entry)


def _bounds(entry: dict[str, Any]) -> str:
    words = (
        ("minimum", "≥"),
        ("exclusiveMinimum", ">"),
        ("maximum", "≤"),
        ("exclusiveMaximum", "<"),
    )
    shown = [
        f"{sign} {entry[name]:g}"
        for name, sign in words
        if name in entry and abs(entry[name]) < SHOWN_BOUND
    ]
    return f" {', '.join(shown)}" if shown else ""
