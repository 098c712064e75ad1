"""``model.flex``: the settings of ``attention:flex``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from apt_core import Inactive, Problem
from apt_core.providers.attention import MHASettings
from apt_core.sections import Size

if TYPE_CHECKING:
    from apt_core.config import Config

SECTION = "model.flex"
NAME = "flex"


class FlexSettings(MHASettings):
    """``model.flex``: multi-head attention in a sliding window, with the settings of
    ``model.mha``."""

    SECTION: ClassVar[str] = SECTION

    window: Size | None = Field(
        default=256,
        description="Tokens that each token sees, itself included; null: all of its text.",
    )
    prefix: Annotated[int, Field(ge=0, le=2**16)] = Field(
        default=0,
        description="First tokens of a text that all later ones see, outside of the window too.",
    )


def settings_of(config: Config) -> FlexSettings:
    """The section of a profile that was loaded with the plugin."""
    settings = config.section(SECTION)
    assert isinstance(settings, FlexSettings)
    return settings


def contradictions(config: Config) -> Iterator[Problem]:
    """Problems that concern more than one key, each with a remedy."""
    settings, model = settings_of(config), config.model
    if NAME not in model.attention_names:
        return
    width = settings.width_of(model.d_model, model.num_heads)
    if width % 2 and model.position_name == "rope":
        given = settings.head_dim is not None
        yield Problem(
            f"the head width {width} is odd, and RoPE turns pairs",
            f"{SECTION}.head_dim" if given else "model.num_heads",
            hint="choose an even width, or another model.position_name",
        )


def inactive(config: Config) -> Iterator[Inactive]:
    """Keys that other keys leave without an effect."""
    settings, model = settings_of(config), config.model
    if NAME not in model.attention_names:
        because = ("model.attention_name", "model.attention_pattern")
        yield Inactive(SECTION, f"no attention of the model is {NAME}", because)
        return
    yield from settings.inactive()
    if settings.window is None:
        key = f"{SECTION}.window"
        yield Inactive(f"{SECTION}.prefix", f"{key} is null: a token sees all of its text", (key,))
    elif settings.window >= model.max_seq_len:
        reason = f"model.max_seq_len is {model.max_seq_len}: the window holds every text"
        for key in ("window", "prefix"):
            yield Inactive(f"{SECTION}.{key}", reason, ("model.max_seq_len",))
