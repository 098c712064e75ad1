"""``growth``: the settings of what a model grows to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, Strict

from apt_core import Problem
from apt_core.sections import Section, Size

if TYPE_CHECKING:
    from apt_core.config import Config

Layers = Annotated[int, Field(ge=1, le=2**12)]
SIZES = ("d_model", "num_heads", "d_ff", "num_layers", "vocab_size")
"""The keys of ``model`` that grow."""


class GrowthSettings(Section):
    """``growth``: the sizes of the model after it has grown; those that are left out stay."""

    d_model: Size | None = Field(default=None, description="Width of the residual stream.")
    num_heads: Size | None = Field(
        default=None,
        description="Attention heads, whose width stays; without it they grow with d_model.",
    )
    d_ff: Size | None = Field(default=None, description="Hidden width of the feed-forward.")
    num_layers: Layers | None = Field(default=None, description="Number of blocks.")
    vocab_size: Size | None = Field(default=None, description="Number of token ids.")
    insert_after: (
        Annotated[
            tuple[Annotated[int, Field(ge=0, lt=2**12)], ...],
            Strict(False),
            Field(max_length=2**12),
        ]
        | None
    ) = Field(
        default=None,
        description="The number of the block, from 0, after which each new one comes; without it "
        "they are spread evenly.",
    )
    new_blocks: Literal["copies", "initial"] = Field(
        default="copies",
        description="How new blocks start: as copies of the block before, or with initial values. "
        "Either way they add nothing at first.",
    )


def settings_of(config: Config) -> GrowthSettings:
    """The section ``growth`` of a profile that was validated with the plugin."""
    settings = config.section("growth")
    assert isinstance(settings, GrowthSettings)
    return settings


def head_width(config: Config) -> int | None:
    """The width that the heads of the model have by ``model.d_model``; None if a setting says it
    for all."""
    model = config.model
    if set(model.attention_names) == {"mha"} and model.mha.head_dim is not None:
        return None
    return model.d_model // model.num_heads


def heads_after(config: Config) -> int:
    """The number of heads after the growth."""
    settings, width = settings_of(config), head_width(config)
    if settings.num_heads is not None:
        return settings.num_heads
    if width is None or settings.d_model is None:
        return config.model.num_heads
    return settings.d_model // width


def contradictions(config: Config) -> Iterator[Problem]:
    """Problems of several keys together that can be found without building a layer."""
    settings, model = settings_of(config), config.model
    asked = {key: getattr(settings, key) for key in SIZES}
    if not any(asked.values()):
        yield Problem(
            "says no size, so that nothing would grow",
            key="growth",
            hint=f"give one of {', '.join(SIZES)}, or leave the plugin out: --plugin no:growth",
        )
    for key, size in asked.items():
        now = getattr(model, key)
        if size is not None and size <= now:
            what = "is what the model has" if size == now else "is smaller than now"
            yield Problem(
                f"{size} {what}: model.{key} is {now}, and it can only grow",
                key=f"growth.{key}",
                hint=f"choose more than {now}, or leave it out",
            )
    yield from _heads(config)
    yield from _blocks(config)


def _heads(config: Config) -> Iterator[Problem]:
    settings, model, width = settings_of(config), config.model, head_width(config)
    heads = heads_after(config)
    d_model = settings.d_model or model.d_model
    if width is not None and heads * width != d_model:
        if settings.num_heads is None:
            low = d_model // width * width
            message = f"{d_model} is not a multiple of the width of a head, {width}, which stays"
            hint = f"{low} and {low + width} are" if low > model.d_model else f"{low + width} is"
            yield Problem(message, key="growth.d_model", hint=hint)
        else:
            yield Problem(
                f"{heads} heads of {width}, whose width stays, make {heads * width}, and the model "
                f"is then {d_model} wide",
                key="growth.num_heads",
                hint="leave it out: heads grow with d_model",
            )
        return
    kv_heads = model.num_kv_heads or model.num_heads
    if heads * kv_heads % model.num_heads:
        group = model.num_heads // kv_heads
        key = "growth.d_model" if settings.num_heads is None else "growth.num_heads"
        yield Problem(
            f"{heads} heads cannot share keys and values {group} by {group}, as now",
            key=key,
            hint=f"choose a multiple of {group} heads",
        )


def _blocks(config: Config) -> Iterator[Problem]:
    settings, now = settings_of(config), config.model.num_layers
    places, layers = settings.insert_after, settings.num_layers
    if places is None:
        return
    added = 0 if layers is None else layers - now
    if len(places) != added:
        yield Problem(
            f"names {len(places)} places, and {max(0, added)} blocks are added",
            key="growth.insert_after",
            hint="name one for each new block, the same several times if need be, or leave it out",
        )
    if beyond := [place for place in places if place >= now]:
        yield Problem(
            f"there is no block {beyond[0]}: the model has {now}, from 0 to {now - 1}",
            key="growth.insert_after",
            hint=f"choose from 0 to {now - 1}",
        )
