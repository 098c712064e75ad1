"""The section ``model.bistate`` of the profile, and the checks that need other sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from apt_core import Inactive, Problem
from apt_core.sections import Ramp, Section

if TYPE_CHECKING:
    from apt_core.config import Config

SECTION = "model.bistate"
WEIGHT = "align_weight"
"""The schedule parameter that overrides ``weight``."""

DEFAULT = "bistate_default"


class BistateSettings(Section):
    """``model.bistate``: the stable state, and how much the live state is pulled towards it."""

    alpha: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.35, description="Weight of the divergence between the two states."
    )
    beta: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.20, description="Weight of the contrastive term; it needs model.tva.s >= 1."
    )
    tau_align: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=0.15, description="Temperature of the contrastive term."
    )
    weight: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=1.0,
        description="Factor on both terms; schedules.align_weight overrides it. 0: no second "
        "forward.",
    )
    mode: Literal["ema", "rdrop"] = Field(
        default="ema",
        description="The second state: a moving average of the weights, or a second pass of the "
        "model with different dropout.",
    )
    momentum_start: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.99, description="Decay of the average in the first step (mode: ema)."
    )
    momentum_end: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.999, description="Decay at which the rise of the momentum ends (mode: ema)."
    )
    align: Annotated[str, Field(min_length=1, max_length=500)] = Field(
        default=DEFAULT, description="Provider of the objective."
    )

    def momentum(self, age: int) -> float:
        """The decay of the average ``age`` steps after the one that started it.

        The average reaches back 1/(1 - momentum) steps. Each step adds one to that, from
        ``momentum_start`` until ``momentum_end`` is reached. So the decay depends on the position
        alone, not on the length of the run.
        """
        return min(self.momentum_end, 1 - 1 / (1 / (1 - self.momentum_start) + age))


def settings_of(config: Config) -> BistateSettings:
    """The section of a profile that was loaded with the plugin."""
    settings = config.section(SECTION)
    assert isinstance(settings, BistateSettings)
    return settings


def contradictions(config: Config) -> Iterator[Problem]:
    """Problems that concern more than one key, each with a remedy."""
    settings, model = settings_of(config), config.model
    if settings.alpha == settings.beta == 0:
        yield Problem(
            "alpha and beta are both 0: nothing would be aligned",
            SECTION,
            hint="raise one of them, or leave the plugin out: --plugin no:align",
        )
    if settings.beta > 0 and settings.align == DEFAULT:
        # The vein comes from the compensator, which these attentions alone have.
        with_vein = " and ".join(model.tva.ATTENTIONS)
        what = "the contrastive term needs the vein, the main directions of the compensator"
        if not set(model.attention_names) & set(model.tva.ATTENTIONS):
            yield Problem(
                f"{what}, which no attention of this model has, only {with_vein}",
                f"{SECTION}.beta",
                hint="set model.attention_name to tva_default with model.tva.s of 1 or more, or "
                "model.bistate.beta to 0",
            )
        elif model.tva.s == 0:
            yield Problem(
                f"{what}, and model.tva.s is 0",
                f"{SECTION}.beta",
                hint="set model.tva.s to 1 or more, or model.bistate.beta to 0",
            )
    if settings.mode == "rdrop" and model.dropout == 0:
        yield Problem(
            "rdrop compares two passes with different dropout, and with model.dropout = 0 they are "
            "equal",
            f"{SECTION}.mode",
            hint="set model.dropout above 0, or model.bistate.mode to ema",
        )
    if settings.mode == "rdrop" and config.hardware.distributed == "fsdp":
        # The backward of the second pass gathers the shards. A process whose micro-batch is all
        # padding adds no term, takes no part in the gathering, and the others would hang.
        yield Problem(
            "rdrop is not possible with sharded weights (hardware.distributed: fsdp)",
            f"{SECTION}.mode",
            hint="set model.bistate.mode to ema, or hardware.distributed to true",
        )
    if settings.mode == "ema" and settings.momentum_start > settings.momentum_end:
        yield Problem(
            f"{settings.momentum_start} is more than momentum_end = {settings.momentum_end}: the "
            "decay of the average can only rise",
            f"{SECTION}.momentum_start",
            hint="lower it, or raise model.bistate.momentum_end",
        )
    weight = config.schedules.get(WEIGHT, 0)
    lowest = min(weight.start, weight.end) if isinstance(weight, Ramp) else weight
    if lowest < 0:
        yield Problem(
            f"{lowest} would push the two states apart",
            f"schedules.{WEIGHT}",
            hint="weights are 0 or more",
        )


def inactive(config: Config) -> Iterator[Inactive]:
    """Keys that other keys leave without an effect."""
    settings = settings_of(config)
    if settings.mode != "ema":
        for key in ("momentum_start", "momentum_end"):
            reason = f"{SECTION}.mode is {settings.mode!r}: there is no average"
            yield Inactive(f"{SECTION}.{key}", reason, (f"{SECTION}.mode",))
    if settings.beta == 0:
        reason = f"{SECTION}.beta is 0: there is no contrastive term"
        yield Inactive(f"{SECTION}.tau_align", reason, (f"{SECTION}.beta",))
    if WEIGHT in config.schedules:
        key = f"schedules.{WEIGHT}"
        yield Inactive(f"{SECTION}.weight", f"{key} takes its place", (key,))
