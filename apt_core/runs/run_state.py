"""The state of a run at a position: live, as JSON in a checkpoint, and back.

A checksum says that a file is as it was written; that it holds the state of a run is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from apt_core.data.looks import Look

Count = Annotated[int, Field(ge=0, le=2**62)]
Number = int | float
Scalar = bool | int | float | str
Text = str


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=True)


class Modes(_Part):
    """Which parameters learn, and which modules are in training mode, at the start and ``now``;
    ``staged`` are the parameters that stages of the trainable set have frozen or thawed."""

    at_start: dict[str, bool]
    now: dict[str, bool]
    staged: list[Text] = []


class StoppingState(_Part):
    watched: Text
    reference: Annotated[float, Field(allow_inf_nan=False)] | None
    since: Count
    judged_step: Count


class TimelineEntry(_Part):
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
"""Settings of a group that follow from plan and position, and are not saved."""


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
    """A change of the model by ``plugin``: ``step`` and ``epoch`` are the first of the new
    structure, the losses are of a fixed batch of held-out text (nats per token, in fp32), and the
    ``quarantined`` plugins had no say in the new optimizer."""

    plugin: Text
    epoch: Count
    step: Count
    loss_before: float
    loss_after: float
    quarantined: list[Text] = []


class Trainable(_Part):
    """Stage ``number`` of the trainable set, from 1, that ``plugin`` has declared: it began with
    ``step`` of ``epoch``. ``frozen`` and ``thawed`` are patterns that choose what it changed, of so
    many parameters; ``trained`` parameters learn since then."""

    plugin: Text
    number: Count
    epoch: Count
    step: Count
    frozen: list[Text] = []
    thawed: list[Text] = []
    frozen_parameters: Count = 0
    thawed_parameters: Count = 0
    trained: Count


class Change(_Part):
    key: Text
    step: Count
    before: Any
    after: Any


WAITING, DISABLED = "waits for its schedule", "disabled by its schedule"


class Progress(_Part):
    """How far a run has come, and what happened on the way.

    ``step`` counts the optimizer steps taken, ``epoch`` from 1, ``tokens`` those of the
    windows that were trained on: all their positions, padding too.
    ``metrics`` is the newest row of a step, with the scores of an evaluation since; ``scores`` are
    those of the newest evaluation of the whole held-out text, with their ``step``, and
    ``start_scores`` those before the first step. ``timeline`` says when plugins were enabled and
    disabled, ``transforms`` which of them changed the model, in order, ``trainable`` what was
    frozen and thawed by stages, ``changes`` which settings a resume was told to change, and
    ``looks`` which data a run knew that began early.
    """

    step: Count = 0
    epoch: Annotated[int, Field(ge=1, le=2**62)] = 1
    ended_epochs: Count = 0
    tokens: Count = 0
    start_scores: dict[str, Number] = {}
    scores: dict[str, Number] = {}
    metrics: dict[str, Scalar] = {}
    timeline: list[TimelineEntry] = []
    transforms: list[Switch] = []
    trainable: list[Trainable] = []
    changes: list[Change] = []
    looks: list[Look] = []

    def why_dormant(self, plugin: str) -> str:
        """Why ``plugin``, which has a schedule, is not enabled; "" where it is."""
        events = [entry.event for entry in self.timeline if entry.plugin == plugin]
        if not events:
            return WAITING
        return "" if events[-1] == "enabled" else DISABLED


class RunState(Progress):
    """A run at a position, whole but for its tensors.

    ``tensors`` lists the type and shape of each tensor of the checkpoint by file and name,
    ``windows_per_step``, ``precision``, ``data_sha256`` and ``tokens_sha256`` say what the position
    counts and on what text, ``windows`` how many windows an epoch has of each source.
    """

    windows_per_step: Annotated[int, Field(ge=1, le=2**62)]
    nonfinite_steps: Annotated[list[Count], Field(min_length=2)]
    modes: Modes
    spent: dict[str, Number] = {}
    stopping: StoppingState
    precision: Text
    data_sha256: Text
    tokens_sha256: dict[str, Text] | None = None
    windows: list[Count] | None = None
    plugins: dict[str, Any]
    plugin_records: dict[str, Record]
    optimizer_groups: list[Group]
    averages: list[Average]
    tensors: dict[str, dict[str, list[Any]]] | None = None

    @classmethod
    def of(cls, progress: Progress, **parts: Any) -> RunState:
        """The state of a run that has come to ``progress``; ``parts`` are the other fields.

        Nothing is validated: a checkpoint is not lost over what a plugin has put into the metrics.
        """
        return cls.model_construct(**dict(progress), **parts)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> RunState:
        """The state that :meth:`to_json` gave. Raises ValueError, which says what is wrong by key,
        for anything else: a key that is missing, unknown, or of another form."""
        if missing := sorted(ALWAYS - state.keys()):
            raise ValueError(f"it has no {', '.join(missing)}")
        try:
            return cls.model_validate(state)
        except ValidationError as error:
            found = [
                f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
                for item in error.errors(include_url=False, include_input=False)
            ]
            more = len(found) - MOST_TOLD
            told = found[:MOST_TOLD] + ([f"and {more} more"] if more > 0 else [])
            raise ValueError(f"not a checkpoint's: {'; '.join(told)}") from None

    def to_json(self) -> dict[str, Any]:
        """JSON values, for :meth:`from_json`; of the metrics those that are such."""
        metrics = {
            name: value
            for name, value in self.metrics.items()
            if isinstance(name, str) and isinstance(value, bool | int | float | str)
        }
        return self.model_dump(warnings=False) | {"metrics": metrics}

    @property
    def progress(self) -> Progress:
        """A copy of its part, for a run that goes on from it."""
        return Progress(**{name: getattr(self, name) for name in Progress.model_fields})


ALWAYS = {
    "step",
    "epoch",
    "ended_epochs",
    "tokens",
    "start_scores",
    "scores",
    "metrics",
    "timeline",
    "transforms",
    "windows_per_step",
    "nonfinite_steps",
    "modes",
    "stopping",
    "precision",
    "data_sha256",
    "plugins",
    "plugin_records",
    "optimizer_groups",
    "averages",
}
"""Keys that every checkpoint has, of earlier versions too. A key that came later needs a default,
which says what runs without it did."""

MOST_TOLD = 3
