"""The section ``trainable`` of the profile: its stages, and the checks of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from apt_core import Problem, TrainableStage
from apt_core.sections import Section

if TYPE_CHECKING:
    from apt_core.config import Config
    from apt_core.types import Unit

SECTION = "trainable"

Pattern = Annotated[str, Field(min_length=1, max_length=500, pattern=r"^[^\s.]+(\.[^\s.]+)*$")]
"""A pattern of parameters' names, as apt_core.modeling.parameter_names reads it."""

Patterns = Annotated[list[Pattern], Field(max_length=1000)]
Position = Annotated[int, Field(ge=1, le=2**62)]


class StageSettings(Section):
    """A stage: what is frozen and thawed from its position on."""

    at_step: Position | None = Field(
        default=None, description="The step with which it begins; one without a position is first."
    )
    at_epoch: Position | None = Field(
        default=None, description="The epoch with which it begins, in place of a step."
    )
    at_token: Position | None = Field(
        default=None, description="The tokens after which it begins, in place of a step."
    )
    freeze: Patterns = Field(
        default_factory=list,
        description="Names of parameters that are frozen: words between dots, such as embedding, "
        "blocks.0-3 or blocks.*.attention.",
    )
    thaw: Patterns = Field(
        default_factory=list,
        description="Names of parameters that are not frozen any more; also some of those that the "
        "same stage freezes, which it leaves out by this.",
    )

    @property
    def positions(self) -> list[tuple[Unit, int]]:
        """The positions that it names, of which it may have one."""
        named: list[tuple[Unit, int | None]] = [
            ("step", self.at_step),
            ("epoch", self.at_epoch),
            ("token", self.at_token),
        ]
        return [(unit, at) for unit, at in named if at is not None]


class TrainableSettings(Section):
    """``trainable``: which parameters are trained, in stages."""

    stages: Annotated[list[StageSettings], Field(max_length=1000)] = Field(
        default_factory=list, description="The stages, in the order of the run."
    )


def settings_of(config: Config) -> TrainableSettings:
    """The section of a profile that was validated with the plugin."""
    settings = config.section(SECTION)
    assert isinstance(settings, TrainableSettings)
    return settings


def contradictions(config: Config) -> Iterator[Problem]:
    """Problems that are seen in a stage alone."""
    for number, stage in enumerate(settings_of(config).stages):
        key, positions = _key(number), stage.positions
        if len(positions) > 1:
            names = " and ".join(f"at_{unit}" for unit, _ in positions)
            yield Problem(f"begins {names}", key, hint="name one of them")
        if number and not positions:
            yield Problem(
                "does not say when it begins", key, hint="give it at_step, at_epoch or at_token"
            )
        if not (stage.freeze or stage.thaw):
            yield Problem("changes nothing", key, hint="name what it is to freeze or thaw")


def stages_of(config: Config) -> Iterator[TrainableStage]:
    """The stages that the profile declares, but for later ones without a position."""
    for number, stage in enumerate(settings_of(config).stages):
        first: list[tuple[Unit, int]] = [] if number else [("step", 1)]
        for unit, at in (stage.positions or first)[:1]:
            yield TrainableStage(stage.freeze, stage.thaw, unit, at, _key(number))


def _key(number: int) -> str:
    return f"{SECTION}.stages[{number}]"
