"""The section ``model.quant`` of the profile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from pydantic.functional_validators import AfterValidator
from pydantic_core import PydanticCustomError

from apt_core import Inactive
from apt_core.sections import Section

if TYPE_CHECKING:
    from apt_core.config import Config

SECTION = "model.quant"

GROUPS = (32, 64, 128, 256)
"""Sizes of a group: those that torch's kernel of 4 bits takes."""

GROUP = 128


def _group(value: int) -> int:
    if value not in GROUPS:
        words = ", ".join(map(str, GROUPS[:-1]))
        raise PydanticCustomError("apt_choice", f"must be {words} or {GROUPS[-1]}")
    return value


class QuantSettings(Section):
    """``model.quant``: how many bits the weights of the blocks have."""

    bits: Literal[8, 4] = Field(default=8, description="Bits of a weight.")
    group: Annotated[int, AfterValidator(_group)] = Field(
        default=GROUP,
        description="Weights of a row that share a scale, with 4 bits: 32, 64, 128 or 256. Halved, "
        "down to 32, for rows that it does not divide. With 8 bits a whole row shares one.",
    )
    packed: bool = Field(
        default=False,
        description="The weights are kept as integers, and are not trained. apt-quantize writes "
        "this; false is training with rounded weights.",
    )


def settings_of(config: Config) -> QuantSettings:
    """The section ``model.quant`` of a profile that was validated with the plugin."""
    settings = config.section(SECTION)
    assert isinstance(settings, QuantSettings)
    return settings


def inactive(config: Config) -> Iterator[Inactive]:
    """Settings that are inactive because of others."""
    if settings_of(config).bits == 8:
        why = f"{SECTION}.bits is 8: a row has one scale"
        yield Inactive(f"{SECTION}.group", why, (f"{SECTION}.bits",))
