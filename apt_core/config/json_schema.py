"""The profile as JSON Schema (draft 2020-12), for editors that complete and check keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from apt_core.config.schema import Config
from apt_core.secrets import without_secrets
from apt_core.types import SectionSpec

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(sections: Sequence[SectionSpec] = ()) -> dict[str, Any]:
    """The schema of a whole profile, the sections of plugins put where they belong."""
    owned = {spec.path: spec.model for spec in sections if spec.path and spec.model is not None}
    models = [(model, "validation") for model in (Config, *owned.values())]
    references, shared = models_json_schema(models)  # type: ignore[arg-type]
    definitions: dict[str, Any] = shared["$defs"]
    root = _resolve(references[Config, "validation"], definitions)
    for path, model in sorted(owned.items(), key=lambda item: item[0].count(".")):
        _put(root, path.split("."), references[model, "validation"], definitions)
    root["properties"]["extends"] = {
        "type": "string",
        "description": "Name or path of a profile that this one builds on.",
    }
    mask_defaults([root, definitions])
    return {"$schema": DIALECT, **root, "title": "APT profile", "$defs": definitions}


def mask_defaults(schema: Any) -> None:
    """Mask the defaults that are secrets: one may be taken from the environment."""
    for part in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(part, dict | list):
            mask_defaults(part)
    properties = schema.get("properties") if isinstance(schema, dict) else None
    for key, entry in properties.items() if isinstance(properties, dict) else ():
        if isinstance(entry, dict) and "default" in entry:
            entry["default"] = without_secrets({key: entry["default"]}, depth=1)[key]


def _put(
    schema: dict[str, Any],
    path: Sequence[str],
    reference: dict[str, Any],
    definitions: dict[str, Any],
) -> None:
    for key in path[:-1]:
        properties = schema.setdefault("properties", {})
        schema = _resolve(
            properties.setdefault(key, {"type": "object", "additionalProperties": False}),
            definitions,
        )
    schema.setdefault("properties", {})[path[-1]] = reference


def _resolve(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    resolved: dict[str, Any] = definitions[reference.removeprefix("#/$defs/")]
    return resolved
