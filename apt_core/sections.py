"""What every section of the profile is made of: strict models and a few shared field types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
)
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A section of the profile: strict types, no unknown key, no NaN, immutable.

    A plugin's own section may derive from it to be as strict as the core's.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _text(value: Any) -> Any:
    """Take ``version: 1.0`` as text: nobody quotes version numbers in YAML."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value


def one_of(*choices: bool | str) -> BeforeValidator:
    """For a ``Literal`` that mixes booleans and words, which on its own would take 1 for true."""
    words = [repr(choice) if isinstance(choice, str) else str(choice).lower() for choice in choices]
    message = f"must be {', '.join(words[:-1])} or {words[-1]}"
    texts = [choice for choice in choices if isinstance(choice, str)]

    def check(value: Any) -> Any:
        if not isinstance(value, bool | str) or value not in choices:
            raise PydanticCustomError("apt_choice", message, {"choices": texts})
        return value

    return BeforeValidator(check)


Text = Annotated[str, BeforeValidator(_text), Field(max_length=10_000)]
Name = Annotated[str, Field(min_length=1, max_length=500)]

# Bounds are far beyond anything trainable: they keep products of sizes within 64 bits.
Size = Annotated[int, Field(ge=1, le=2**24)]
Count = Annotated[int, Field(ge=1, le=2**40)]
CountOrZero = Annotated[int, Field(ge=0, le=2**40)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Ramp(Section):
    """A parameter that moves over the run: from ``start`` to ``end``, measured ``by`` a unit."""

    start: Annotated[float, Field(ge=-1e30, le=1e30)] = Field(
        description="Value at the first position."
    )
    end: Annotated[float, Field(ge=-1e30, le=1e30)] = Field(
        description="Value at the last position, and after it."
    )
    by: Literal["epoch", "step", "token"] = Field(
        default="epoch", description="What the position is measured in."
    )
    shape: Literal["linear", "cosine", "exponential"] = Field(
        default="linear", description="The curve."
    )
    warmup: Count | None = Field(
        default=None,
        description="Go from start to end over this many units, then stay at the end.",
    )
    until: Count | None = Field(
        default=None,
        description="The last position of the ramp; without it, the end of the run.",
    )


Entry = int | float | Ramp


def _entry(value: Any) -> Entry:
    if isinstance(value, Ramp):
        return value
    if isinstance(value, Mapping):
        return Ramp.model_validate(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError(
            "apt_schedule", "must be a number or a ramp such as {start: 1.5, end: 0.8, by: epoch}"
        )
    if not -1e30 <= value <= 1e30:
        raise PydanticCustomError("apt_schedule", "must be a number within ±1e30")
    return value


def _plain(entry: Entry) -> Any:
    return entry.model_dump(exclude_none=True) if isinstance(entry, Ramp) else entry


ScheduleEntry = Annotated[
    Entry, PlainValidator(_entry, json_schema_input_type=Entry), PlainSerializer(_plain)
]
