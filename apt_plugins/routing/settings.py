"""The section ``routing`` of the profile, and the checks that need other sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from apt_core import Inactive, Problem
from apt_core.sections import Ramp, Section
from apt_plugins.moe.settings import MoeSettings

if TYPE_CHECKING:
    from apt_core.config import Config

SCHEDULE_PARAMS = ("route_temp", "moe_capacity")


class RoutingSettings(Section):
    """``routing``: exploration and balance of the routers of a mixture of experts."""

    exploration: Annotated[float, Field(ge=0, le=1e3)] = Field(
        default=0.0,
        description="Gumbel noise on the routers' scores in training: 0 always takes the top k, "
        "1 draws k experts by their probabilities.",
    )
    balancing: Literal["none", "bias"] = Field(
        default="none",
        description="bias: even out the load by a bias on the choice of experts, which every step "
        "moves against the load, and which changes no gradient.",
    )
    bias_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1e-3, description="Change of that bias in a step; sized for sigmoid scores."
    )


def settings_of(config: Config) -> RoutingSettings:
    """The section of a profile that was loaded with the plugin."""
    settings = config.section("routing")
    assert isinstance(settings, RoutingSettings)
    return settings


def has_experts(config: Config) -> bool:
    """Whether the run has a mixture of experts, from the start or after a switch."""
    moe = config.section("model.moe")
    return isinstance(moe, MoeSettings) and moe.enabled


def contradictions(config: Config) -> Iterator[Problem]:
    """Problems that concern more than one key, each with a remedy."""
    for name in SCHEDULE_PARAMS:
        value = config.schedules.get(name)
        if value is None:
            continue
        ends = (value.start, value.end) if isinstance(value, Ramp) else (value,)
        if min(ends) <= 0:
            yield Problem(
                f"reaches {min(ends):g}, and a {_MEANINGS[name]} must be more than 0",
                key=f"schedules.{name}",
                hint="choose positive values",
            )
    moe = config.section("model.moe")
    if "moe_capacity" in config.schedules and isinstance(moe, MoeSettings) and moe.dropless:
        yield Problem(
            "limits the tokens of an expert, and model.moe.dropless forbids dropping any",
            key="schedules.moe_capacity",
            hint="set model.moe.dropless to false, or take this key out",
        )


def inactive(config: Config) -> Iterator[Inactive]:
    """Keys that other keys leave without an effect; a run without experts is warned instead."""
    if not has_experts(config):
        return
    if settings_of(config).balancing == "none":
        yield Inactive("routing.bias_rate", "routing.balancing is 'none'", ("routing.balancing",))
    if "moe_capacity" in config.schedules:
        key = "schedules.moe_capacity"
        yield Inactive("model.moe.capacity", f"{key} takes its place", (key,))


_MEANINGS = {"route_temp": "temperature", "moe_capacity": "capacity"}
