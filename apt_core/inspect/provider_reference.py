"""The reference of every provider as Markdown: by kind, with settings and defaults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from apt_core.catalogue import Catalogue
from apt_core.config import settings_tables
from apt_core.kinds import KINDS, Kind, naming_keys
from apt_core.types import CORE, ProviderSpec, SectionSpec

HEADER = """# Providers

Generated from what the core and plugins declare, by `apt-hooks docs providers`. A key of the
profile chooses a provider by its name; naming one of a plugin activates the plugin.
`apt-hooks info KIND NAME` shows one, `apt-hooks providers` which can be used on this machine.
"""


def provider_reference(catalogue: Catalogue, sections: list[SectionSpec]) -> str:
    """One section a kind, one part a provider; ``sections`` are those of the plugins."""
    keys: dict[str, list[str]] = {}
    for named, its_keys in naming_keys(sections):
        keys.setdefault(named, []).extend(its_keys)
    parts = [HEADER]
    for kind in KINDS.values():
        specs = catalogue.specs(kind.name)
        if not specs:
            continue
        parts.append(f"## {kind.name}\n\n{_about_kind(kind, keys.get(kind.name, []), catalogue)}\n")
        tables: dict[str, str] = {}
        parts += [
            _provider(spec, catalogue.get_info(spec.kind, spec.name), tables) for spec in specs
        ]
    return "\n".join(parts)


def _about_kind(kind: Kind, keys: list[str], catalogue: Catalogue) -> str:
    told = []
    default = catalogue.default(kind.name)
    if keys:
        none = ", or `none`" if kind.optional else ""
        told.append(f"Named by {_and(keys)}{none}.")
    if default:
        told.append(f"By default `{default.name}`.")
    if kind.fallback and default:
        told.append("One that cannot be used here falls back to the default, with the reason.")
    elif not kind.fallback:
        told.append("One that cannot be used is an error: there is no fallback.")
    return " ".join(told) or "Used by plugins."


def _provider(spec: ProviderSpec, facts: dict[str, Any], tables: dict[str, str]) -> str:
    """One provider; ``tables`` are those written before for its kind, by their text."""
    of = "of the core" if spec.plugin == CORE else f"of the plugin `{spec.plugin}`"
    summary = f"{spec.summary[:1].upper()}{spec.summary[1:]}" if spec.summary else spec.key
    lines = [f"### {spec.key}", "", f"{summary}. {of[:1].upper()}{of[1:]}.".replace("..", ".")]
    if spec.requires:
        lines[-1] += f" Needs {_and(spec.requires)}."
    if spec.conflicts:
        lines[-1] += f" Not together with {_and(spec.conflicts)}."
    if spec.reads:
        lines[-1] += f" Reads {_and(spec.reads)}."
    lines += [*_settings(spec, facts["config"]["schema"], tables), ""]
    return "\n".join(lines)


def _settings(spec: ProviderSpec, schema: dict[str, Any], tables: dict[str, str]) -> Iterator[str]:
    if not schema.get("properties"):
        if spec.section:
            yield f"\nReads the section `{spec.section}` ([keys](profiles.md#every-key))."
        return
    yield f"\nSettings, under `{spec.section}`:\n" if spec.section else "\nSettings:\n"
    text = "\n".join(
        (f"In `{path}`:\n\n" if path else "") + table for path, table in settings_tables(schema)
    )
    if text in tables:
        yield f"Those of `{tables[text]}`."
        return
    tables[text] = spec.key
    yield text.rstrip("\n")


def _and(words: Any) -> str:
    *first, last = [f"`{word}`" for word in words]
    return f"{', '.join(first)} and {last}" if first else last
