"""The section ``model.voting`` of the profile, and the checks that need other sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from apt_core import Inactive, Problem
from apt_core.sections import Ramp, Section

if TYPE_CHECKING:
    from apt_core.config import Config

MAX_CONTINUATIONS = 256
"""Voters of more than one token are computed together, so that they are no more than this."""


class VotingSettings(Section):
    """``model.voting``: which tokens are voted on, and by how many voters."""

    threshold: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=2.2, description="Entropy in nats from which tokens are voted on."
    )
    k: Annotated[int, Field(ge=1, le=2**16)] = Field(
        default=3, description="Number of voters; 1 is plain sampling."
    )
    normalized: bool = Field(
        default=False,
        description="Whether the threshold is a share, from 0 to 1, of the largest possible "
        "entropy: ln of the number of token ids.",
    )
    length: Annotated[int, Field(ge=1, le=2**16)] = Field(
        default=1,
        description="Tokens by which each voter continues the text. All tokens of the winning "
        "continuation are taken.",
    )
    winner: Literal["medoid", "majority"] = Field(
        default="medoid",
        description="Which continuation wins: that with the smallest sum of distances to the "
        "others (medoid), or the surest of those that come to the most frequent answer (majority).",
    )
    weight_temperature: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None,
        description="T of the voters' weights, softmax(confidence / T), where the confidence is "
        "the mean log-probability of a voter's tokens. Without it all weights are equal.",
    )
    window: Annotated[int, Field(ge=2, le=2**16)] | None = Field(
        default=None,
        description="Voters that are drawn at a time; a vote ends early with the first window "
        "whose voters all agree. Without it all voters are drawn.",
    )


def settings_of(config: Config) -> VotingSettings:
    """The section of a profile that was loaded with the plugin."""
    settings = config.section("model.voting")
    assert isinstance(settings, VotingSettings)
    return settings


def contradictions(config: Config) -> Iterator[Problem]:
    """Problems that concern more than one key, each with a remedy."""
    settings = settings_of(config)
    key, value = "schedules.vote_threshold", config.schedules.get("vote_threshold")
    if value is None:
        key, value = "model.voting.threshold", settings.threshold
    ends = (value.start, value.end) if isinstance(value, Ramp) else (value,)
    if min(ends) < 0:
        yield Problem(
            f"reaches {min(ends):g}, and no entropy is below 0",
            key=key,
            hint="0 votes on every token",
        )
    if settings.normalized and max(ends) > 1:
        yield Problem(
            f"reaches {max(ends):g}, and a share of the largest entropy is at most 1",
            key=key,
            hint="choose values from 0 to 1, or set model.voting.normalized to false",
        )
    if settings.length > 1 and settings.k > MAX_CONTINUATIONS:
        yield Problem(
            f"is {settings.k:,}, and at most {MAX_CONTINUATIONS} voters continue a text by "
            "several tokens",
            key="model.voting.k",
            hint="choose fewer voters, or set model.voting.length to 1",
        )


def inactive(config: Config) -> Iterator[Inactive]:
    """Keys that other keys leave without an effect."""
    settings = settings_of(config)
    if settings.k == 1:
        for key in VotingSettings.model_fields:
            if key != "k":
                yield Inactive(
                    f"model.voting.{key}", "one voter is plain sampling", ("model.voting.k",)
                )
    elif settings.length == 1:
        reason = "draws of one token cost nothing and agree only if they are the same"
        for key in ("window", "winner"):
            yield Inactive(f"model.voting.{key}", reason, ("model.voting.length",))
    elif settings.window is not None and settings.window >= settings.k:
        reason = "all voters are drawn in one window"
        yield Inactive("model.voting.window", reason, ("model.voting.k",))
