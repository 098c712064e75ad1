"""Text is taken as it was written: ``version: 1.10`` is no number, and ``name: on`` no truth value.

YAML decides what a value is by how it looks, and forgets the spelling. Which keys are text is known
from the models of their sections, so that there the spelling takes the place of the value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from apt_core.config.yaml_text import KeyPath, dotted


@dataclass
class TextKeys:
    """Puts ``texts``, the spelling of each scalar by its path, where text belongs; ``found`` are
    the paths at which it has."""

    texts: Mapping[KeyPath, str | None]
    found: set[KeyPath] = field(default_factory=set)

    def section(
        self,
        value: Any,
        model: type[BaseModel],
        path: KeyPath = (),
        *,
        skip: Collection[str] = (),
    ) -> Any:
        """A section's data with its text as written. What is no mapping is returned as it is, and
        so are the sections ``skip`` of the profile, by dotted path."""
        if not isinstance(value, Mapping):
            return value
        kinds = {}
        for name, info in model.model_fields.items():
            kinds[name] = kinds[info.alias or name] = _annotation(info)
        return {
            key: self._value(item, kinds[key], (*path, key), skip) if key in kinds else item
            for key, item in value.items()
        }

    def _value(self, value: Any, annotation: Any, path: KeyPath, skip: Collection[str] = ()) -> Any:
        if dotted(path) in skip:
            return value
        members = list(_members(annotation))
        text = self.texts.get(path)
        # An argument that is a list is one where the key takes either.
        is_list = isinstance(value, list) and any(_is_list(member) for member in members)
        if text is not None and not is_list and _is_text(members):
            self.found.add(path)
            return text
        for member in members:
            origin, arguments = get_origin(member), get_args(member)
            if isinstance(member, type) and issubclass(member, BaseModel):
                value = self.section(value, member, path, skip=skip)
            elif isinstance(value, Mapping) and _is_a(origin, Mapping) and len(arguments) == 2:
                value = {k: self._value(v, arguments[1], (*path, k)) for k, v in value.items()}
            elif isinstance(value, list) and _is_a(origin, Collection) and arguments:
                fixed = origin is tuple and arguments[-1] is not Ellipsis
                kinds = arguments if fixed else arguments[:1] * len(value)
                value = [
                    self._value(item, kinds[index], (*path, index)) if index < len(kinds) else item
                    for index, item in enumerate(value)
                ]
        return value


def _annotation(info: FieldInfo) -> Any:
    """A field's type with what pydantic has split off of it."""
    if not info.metadata:
        return info.annotation
    return Annotated[(info.annotation, *info.metadata)]


def _members(annotation: Any) -> Iterator[Any]:
    """The types of a union, without None, or those that a validator declares to take."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *metadata = get_args(annotation)
        inputs = [getattr(item, "json_schema_input_type", PydanticUndefined) for item in metadata]
        inputs = [kind for kind in inputs if kind is not PydanticUndefined]
        yield from _members(inputs[0] if inputs else inner)
    elif origin in (Union, UnionType):
        for argument in get_args(annotation):
            yield from _members(argument)
    elif hasattr(annotation, "__supertype__"):
        yield from _members(annotation.__supertype__)
    elif hasattr(annotation, "__value__"):
        yield from _members(annotation.__value__)
    elif annotation is not NoneType and annotation is not None:
        yield annotation


def _is_list(member: Any) -> bool:
    return _is_a(get_origin(member), Collection) and not _is_a(get_origin(member), Mapping)


def _is_text(members: list[Any]) -> bool:
    """Whether a scalar here must be text."""
    scalars = [
        member
        for member in members
        if not _is_a(get_origin(member) or member, Collection | BaseModel)
        or _is_a(member, str | bytes)
    ]
    return bool(scalars) and all(map(_takes_text, scalars))


def _takes_text(member: Any) -> bool:
    if get_origin(member) is Literal:
        return all(isinstance(choice, str) for choice in get_args(member))
    return _is_a(member, str | PurePath)


def _is_a(kind: Any, of: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, of)
