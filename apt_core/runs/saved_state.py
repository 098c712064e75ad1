"""What the state of a checkpoint is made of. A checksum says that a file is as it was written; that
it is what a checkpoint holds is said here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Count = Annotated[int, Field(ge=0, le=2**62)]
Number = int | float
Scalar = bool | int | float | str
Text = str


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=True)


class Modes(_Part):
    at_start: dict[str, bool]
    now: dict[str, bool]


class StoppingState(_Part):
    watched: Text
    reference: Annotated[float, Field(allow_inf_nan=False)] | None
    since: Count
    judged_step: Count


class Event(_Part):
    plugin: Text
    event: Text
    epoch: Count
    step: Count


class Failure(_Part):
    plugin: Text
    hook: Text
    step: Count
    error: Text
    where: Text
    count: Count
    quarantined: bool
    traceback: Text = ""


class Record(_Part):
    state: Text
    reason: Text
    failures: list[Failure]


RATES = ("lr", "initial_lr")
"""Settings of a group that are a function of the plan and the position, and not saved."""


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)


class Group(_Part):
    parameters: list[Text]
    settings: dict[str, Scalar]
    plan: dict[str, Scalar | list[Any]]

    @model_validator(mode="after")
    def _is_planned(self) -> Group:
        """A step may make another value of a setting, but none of another type."""
        for key, planned in self.plan.items():
            if key in RATES or isinstance(planned, list):
                continue
            value = self.settings.get(key, planned)
            if _kind(value) is not _kind(planned):
                raise ValueError(f"setting {key!r} is {value!r}, and was planned as {planned!r}")
        return self


class Average(_Part):
    plugin: Text
    decay: Annotated[float, Field(ge=0, le=1)]
    asked: Annotated[float, Field(ge=0, le=1)] | None = None


class Switch(_Part):
    model_config = ConfigDict(strict=True, extra="allow")
    plugin: Text
    quarantined: list[Text] = []


class Change(_Part):
    key: Text
    step: Count
    before: Any
    after: Any


class SavedState(_Part):
    """``state.json``. ``tensors`` lists the type and shape of each tensor by file and name."""

    step: Count
    epoch: Annotated[int, Field(ge=1, le=2**62)]
    ended_epochs: Count
    tokens: Count
    windows_per_step: Annotated[int, Field(ge=1, le=2**62)]
    nonfinite_steps: Annotated[list[Count], Field(min_length=2)]
    modes: Modes
    start_scores: dict[str, Number]
    scores: dict[str, Number]
    metrics: dict[str, Scalar]
    spent: dict[str, Number] = {}
    stopping: StoppingState
    timeline: list[Event]
    precision: Text
    data_sha256: Text
    tokens_sha256: dict[str, Text] | None = None
    plugins: dict[str, Any]
    plugin_records: dict[str, Record]
    optimizer_groups: list[Group]
    transforms: list[Switch]
    changes: list[Change] = []
    averages: list[Average]
    tensors: dict[str, dict[str, list[Any]]] | None = None


MOST_TOLD = 3


def faults(state: Mapping[str, Any]) -> list[str]:
    """What is wrong with the state of a checkpoint, by key; empty where it is one."""
    try:
        SavedState.model_validate(state)
    except ValidationError as error:
        found = [
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)
        ]
        more = len(found) - MOST_TOLD
        return found[:MOST_TOLD] + ([f"and {more} more"] if more > 0 else [])
    return []
