"""``to_tva``: the settings of the change from multi-head attention to TVA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from apt_core import Problem
from apt_core.sections import Section, Size

if TYPE_CHECKING:
    from apt_core.config import Config


class ToTVASettings(Section):
    """``to_tva``: every ``mha`` becomes ``tva_default`` of a rank."""

    rank: Size | None = Field(
        default=None, description="The rank; without it the width of a head, which loses nothing."
    )
    tolerance: Annotated[float, Field(gt=0, le=1e3)] | None = Field(
        default=None,
        description="By how many nats per token the loss of a fixed batch may change; has to be "
        "said where the rank is below the width of a head.",
    )


def settings_of(config: Config) -> ToTVASettings:
    """The section ``to_tva`` of a profile that was validated with the plugin."""
    settings = config.section("to_tva")
    assert isinstance(settings, ToTVASettings)
    return settings


def head_width(config: Config) -> int:
    """The width of the heads of ``mha``."""
    return config.model.mha.width_of(config.model.d_model, config.model.num_heads)


def rank_of(config: Config) -> int:
    """The rank after the change."""
    return settings_of(config).rank or head_width(config)


def contradictions(config: Config) -> Iterator[Problem]:
    """Problems of several keys together that can be found without building a layer."""
    model = config.model
    names = [*dict.fromkeys(model.attention_names)]
    if "mha" not in names:
        yield Problem(
            f"the model has no mha that could become TVA: its attention is {', '.join(names)}",
            key="to_tva",
            hint="set model.attention_name to mha, or leave the plugin out: --plugin no:to_tva",
        )
        return
    width, rank = head_width(config), rank_of(config)
    if model.d_model % model.num_heads or rank > model.d_model // model.num_heads:
        yield Problem(
            f"a rank of {rank} is more than model.d_model {model.d_model} / model.num_heads "
            f"{model.num_heads}, in which TVA compresses its heads",
            key="to_tva.rank",
            hint="choose a smaller one",
        )
    elif rank > width:
        yield Problem(
            f"{rank} is more than the width of a head, {width}",
            key="to_tva.rank",
            hint=f"choose at most {width}",
        )
    elif rank < width:
        yield from _lossy(config, width, rank)
    if "tva_default" in names:
        now = model.tva.rank_in(model.d_model // model.num_heads)
        if (now, model.tva.normalises(now)) != (rank, model.mha.qk_norm):
            yield Problem(
                f"other layers are tva_default of rank {now} already, and all have one: "
                f"{rank} would be another",
                key="to_tva.rank",
                hint=f"choose {now}, and the same qk_norm in model.tva and model.mha",
            )


def _lossy(config: Config, width: int, rank: int) -> Iterator[Problem]:
    settings = settings_of(config)
    if settings.tolerance is None:
        yield Problem(
            f"a rank of {rank} is below the width of a head, {width}, and changes the loss",
            key="to_tva.tolerance",
            hint="say by how many nats per token it may change, such as 0.05",
        )
    if config.model.position_name != "rope":
        yield Problem(
            f"of position:{config.model.position_name} no way to a lower rank is known",
            key="to_tva.rank",
            hint=f"choose {width}, which loses nothing, or model.position_name rope",
        )
    elif rank % 2:
        yield Problem(
            f"{rank} is odd, and rope turns pairs", key="to_tva.rank", hint="choose an even rank"
        )
