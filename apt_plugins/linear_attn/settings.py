"""``model.linear_attn``: the settings of ``attention:linear_causal``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from apt_core import Inactive, Problem
from apt_core.sections import Section, Size

if TYPE_CHECKING:
    from apt_core.config import Config

SECTION = "model.linear_attn"
ATTENTION = "linear_causal"


class LinearAttentionSettings(Section):
    """``model.linear_attn``: the gated delta rule."""

    num_heads: Size | None = Field(
        default=None, description="Number of heads; without it model.num_heads."
    )
    head_dim: Size | None = Field(
        default=None,
        description="Width of a head's queries and keys; without it model.d_model over the heads.",
    )
    value_dim: Size | None = Field(
        default=None, description="Width of a head's values; without it that of its keys."
    )
    conv_size: Annotated[int, Field(ge=1, le=64)] = Field(
        default=4,
        description="Tokens that the convolution of queries, keys and values sees, this one "
        "included; 1 only scales them.",
    )
    gate: bool = Field(default=True, description="Multiply the output by a gate of the input.")
    negative_eigenvalues: bool = Field(
        default=False,
        description="Let β reach 2, so that a token may turn round what the state has for its key.",
    )
    chunk_size: Annotated[int, Field(ge=8, le=256)] = Field(
        default=64, description="Tokens that are computed together; changes no result."
    )
    kernel: Literal["auto", "torch"] = Field(
        default="auto",
        description="What computes the rule: auto is flash-linear-attention on a GPU where it is "
        "installed, and torch elsewhere.",
    )

    def heads_of(self, num_heads: int) -> int:
        """The number of heads in a model with ``num_heads``."""
        return num_heads if self.num_heads is None else self.num_heads

    def key_width_of(self, d_model: int, num_heads: int) -> int:
        """The width of a head's keys in a model ``d_model`` wide with ``num_heads``. Raises
        ValueError for heads that do not divide it."""
        if self.head_dim is not None:
            return self.head_dim
        heads = self.heads_of(num_heads)
        if d_model % heads:
            key = "model.num_heads" if self.num_heads is None else f"{SECTION}.num_heads"
            raise ValueError(
                f"model.d_model {d_model} is not divisible by {key} {heads}: choose a divisor, or "
                f"set {SECTION}.head_dim"
            )
        return d_model // heads

    def value_width_of(self, d_model: int, num_heads: int) -> int:
        """The width of a head's values. Raises as :meth:`key_width_of`."""
        if self.value_dim is not None:
            return self.value_dim
        return self.key_width_of(d_model, num_heads)


def settings_of(config: Config) -> LinearAttentionSettings:
    """The section of a profile that was validated with the plugin."""
    settings = config.section(SECTION)
    assert isinstance(settings, LinearAttentionSettings)
    return settings


def used(config: Config) -> bool:
    """Whether a layer of the model is linear attention."""
    return ATTENTION in config.model.attention_names


def contradictions(config: Config) -> Iterator[Problem]:
    """Problems of several keys together that can be found without building a layer."""
    if not used(config):
        return
    settings, model = settings_of(config), config.model
    if settings.head_dim is None and settings.num_heads and model.d_model % settings.num_heads:
        yield Problem(
            f"{settings.num_heads} heads do not divide model.d_model = {model.d_model}",
            key=f"{SECTION}.num_heads",
            hint=f"choose a divisor of {model.d_model}, or set {SECTION}.head_dim",
        )


def inactive(config: Config) -> Iterator[Inactive]:
    """The section where no layer reads it, and keys of others that linear attention ignores where
    all layers are such."""
    if not used(config):
        because = ("model.attention_name", "model.attention_pattern")
        yield Inactive(SECTION, f"no layer is attention:{ATTENTION}", because)
        return
    if set(config.model.attention_names) == {ATTENTION}:
        because = ("model.attention_name", "model.attention_pattern")
        yield Inactive(
            "model.num_kv_heads", f"attention:{ATTENTION} keeps no keys and values", because
        )
        if config.model.position_name == "rope":
            reason = f"attention:{ATTENTION} turns nothing: its decays and its order tell places"
            yield Inactive("model.rope", reason, because)
