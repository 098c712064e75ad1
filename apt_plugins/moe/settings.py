"""``model.moe``: the settings of the mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from apt_core import Inactive, Problem
from apt_core.sections import Section

if TYPE_CHECKING:
    from apt_core.config import Config

# As wide as the core's own bounds: products of sizes stay within 64 bits.
Size = Annotated[int, Field(ge=1, le=2**24)]
ROUTERS = ("topk_moe", "topk_default")
"""The names of this plugin's router."""

Weight = Annotated[float, Field(ge=0, le=1e6)]


class MoeSettings(Section):
    """``model.moe``: every dense feed-forward becomes ``experts`` copies of itself, of which each
    token takes ``top_k``."""

    enabled: bool = Field(default=True, description="Use a mixture of experts.")
    experts: Size = Field(default=8, description="Number of experts.")
    top_k: Size = Field(default=2, description="Experts per token; at most as many as experts.")
    capacity: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=1.25,
        description="Capacity of an expert over its fair share of tokens; what is beyond it is "
        "dropped, in training only.",
    )
    dropless: bool = Field(
        default=False, description="Drop nothing, whatever an expert is sent: no capacity."
    )
    dropless_steps: Annotated[int, Field(ge=0, le=2**62)] = Field(
        default=100,
        description="Steps after the switch without a limit: the router has not learned to even "
        "out the load yet.",
    )
    balance_loss: Weight = Field(
        default=0.01, description="Weight of the load-balancing loss, which is 1 when balanced."
    )
    z_loss: Weight = Field(
        default=1e-3, description="Weight of the loss that keeps the router's logits small."
    )
    granularity: Annotated[int, Field(ge=1, le=2**12)] = Field(
        default=1,
        description="Cut every expert into so many of d_ff / granularity hidden units each, and "
        "choose top_k of each cut; divides d_ff.",
    )
    shared_expert: Literal["none", "zero", "split"] = Field(
        default="none",
        description="A dense feed-forward for every token beside the experts. zero: added, and "
        "silent at the start; split: a share of the output is its from the start.",
    )
    shared_weight: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="Share of the shared expert in the output, if it is split."
    )
    router: Annotated[str, Field(min_length=1, max_length=500)] = Field(
        default=ROUTERS[0], description="Provider of the router."
    )
    scores: Literal["softmax", "sigmoid"] = Field(
        default="softmax", description="What topk_moe makes of its logits before it chooses."
    )
    symmetry_breaking: bool = Field(
        default=True,
        description="Scale the hidden units of each copy by 1/2, 1 or 2, and back: its outputs "
        "stay the same and it learns differently. Not with gelu, which scales nothing.",
    )


def settings_of(config: Config) -> MoeSettings:
    """The section ``model.moe`` of a profile that was validated with the plugin."""
    settings = config.section("model.moe")
    assert isinstance(settings, MoeSettings)
    return settings


def contradictions(config: Config) -> Iterator[Problem]:
    """Problems of several keys together that can be found without building a layer."""
    settings, d_ff = settings_of(config), config.model.d_ff
    if not settings.enabled:
        return
    if settings.top_k > settings.experts:
        yield Problem(
            f"{settings.top_k} experts per token, and there are {settings.experts}",
            key="model.moe.top_k",
            hint="choose top_k <= experts",
        )
    if settings.dropless and settings.capacity < 1:
        yield Problem(
            f"{settings.capacity} drops assignments even where the load is even, and "
            "model.moe.dropless says that nothing is dropped",
            key="model.moe.capacity",
            hint="set dropless to false, or leave capacity out",
        )
    if d_ff % settings.granularity:
        divisors = [n for n in range(1, settings.granularity) if d_ff % n == 0]
        yield Problem(
            f"cuts model.d_ff = {d_ff} into {settings.granularity} parts that are not equal",
            key="model.moe.granularity",
            hint=f"choose a divisor of {d_ff}, such as {divisors[-1]}",
        )


def inactive(config: Config) -> Iterator[Inactive]:
    """Settings that are inactive because of others."""
    settings, section = settings_of(config), "model.moe"

    def beside(key: str, reason: str, decides: str) -> Inactive:
        return Inactive(f"{section}.{key}", reason, (decides,))

    if not settings.enabled:
        yield Inactive(section, f"{section}.enabled is false", (f"{section}.enabled",))
        return
    if settings.dropless:
        for key in ("capacity", "dropless_steps"):
            yield beside(key, f"{section}.dropless: nothing is dropped", f"{section}.dropless")
    if settings.shared_expert != "split":
        reason = f"{section}.shared_expert is {settings.shared_expert!r}, not 'split'"
        yield beside("shared_weight", reason, f"{section}.shared_expert")
    if settings.router not in ROUTERS:
        yield beside("scores", f"it is {ROUTERS[0]}'s alone", f"{section}.router")
    if config.model.ffn_name == "gelu":
        yield beside("symmetry_breaking", "experts of gelu are not scaled", "model.ffn_name")
