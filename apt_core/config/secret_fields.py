"""Which values of a section are secrets by their type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from pydantic import BaseModel, Secret, SecretBytes, SecretStr

from apt_core.config.yaml_text import KeyPath
from apt_core.secrets import MASK, is_mask

SECRETS = (SecretStr, SecretBytes, Secret)


def secret_places(annotation: Any, data: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """The paths and values in plain ``data`` that ``annotation`` says are secrets: in models,
    unions, lists and mappings."""
    annotation = getattr(annotation, "__value__", annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(kind, SECRETS):
        yield path, data
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        if isinstance(data, Mapping):
            for name, field in kind.model_fields.items():
                names = {name, *_aliases(field.alias), *_aliases(field.validation_alias)}
                for key in (key for key in names if key in data):
                    yield from secret_places(field.annotation, data[key], (*path, key))
        elif (root := kind.model_fields.get("root")) is not None:
            yield from secret_places(root.annotation, data, path)
    elif isinstance(kind, type) and (is_dataclass(kind) or is_typeddict(kind)):
        for key, inner in get_type_hints(kind).items() if isinstance(data, Mapping) else ():
            if key in data:
                yield from secret_places(inner, data[key], (*path, key))
    elif kind in (Union, UnionType):
        for inner in arguments:
            yield from secret_places(inner, data, path)
    elif kind is Annotated:
        yield from secret_places(arguments[0], data, path)
    elif isinstance(data, Mapping):
        for key, item in data.items() if arguments else ():
            yield from secret_places(arguments[-1], item, (*path, key))
    elif isinstance(data, list):
        for index, item in enumerate(data):
            for inner in arguments:
                yield from secret_places(inner, item, (*path, index))


def _aliases(alias: Any) -> list[str]:
    return [name for name in getattr(alias, "choices", [alias]) if isinstance(name, str)]


def masks_in(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """The paths in plain data at which the mask of a secret stands."""
    if isinstance(value, Mapping | list):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in pairs:
            yield from masks_in(item, (*path, key))
    elif is_mask(value):
        yield path


def dump(section: BaseModel, *, secrets: bool, by_alias: bool = False) -> dict[str, Any]:
    """A section as plain data; with ``secrets`` those of a type of their own are in it, else their
    masks."""
    plain: dict[str, Any] = section.model_dump(mode="json", by_alias=by_alias)
    if not secrets:
        return plain
    revealed: dict[str, Any] = _revealed(section.model_dump(by_alias=by_alias), plain)
    return revealed


def _revealed(value: Any, plain: Any) -> Any:
    """``plain``, a value's JSON, with what its secrets hold."""
    if isinstance(value, SECRETS):
        told = value.get_secret_value()
        told = told.decode(errors="surrogateescape") if isinstance(told, bytes) else told
        # A serializer of its own may have told it otherwise.
        return told if isinstance(plain, str) and set(plain) <= set(MASK) else plain
    if isinstance(value, Mapping) and isinstance(plain, dict) and len(value) == len(plain):
        return {
            key: _revealed(item, below)
            for item, (key, below) in zip(value.values(), plain.items(), strict=True)
        }
    items = isinstance(plain, list) and isinstance(value, list | tuple | set | frozenset)
    if items and len(value) == len(plain):
        return [_revealed(item, below) for item, below in zip(value, plain, strict=True)]
    return plain
