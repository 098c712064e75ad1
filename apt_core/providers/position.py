"""Providers of position information (kind ``position``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from apt_core.providers.base import Provider
from apt_core.sections import Section, Size
from apt_core.types import Inactive

if TYPE_CHECKING:
    from torch import nn

_Positive = Annotated[float, Field(gt=0, le=1e6)]


class RoPEScaling(Section):
    """``model.rope.scaling``: other frequencies for texts that are longer than those of the first
    training.

    ``linear`` divides all frequencies by ``factor`` (Chen et al., arXiv:2306.15595). ``llama3``
    divides those of wavelengths above ``original_max_seq_len / low_freq_factor``, leaves those
    below ``original_max_seq_len / high_freq_factor``, and goes smoothly from one to the other in
    between (Llama 3.1, arXiv:2407.21783). ``yarn`` divides those that turn less than ``beta_slow``
    times in ``original_max_seq_len``, leaves those that turn more than ``beta_fast`` times, and
    multiplies queries and keys by ``attention_factor`` (Peng et al., arXiv:2309.00071).
    """

    SECTION: ClassVar[str] = "model.rope.scaling"
    OF_TYPE: ClassVar[dict[str, tuple[str, ...]]] = {
        "linear": (),
        "llama3": ("original_max_seq_len", "low_freq_factor", "high_freq_factor"),
        "yarn": ("original_max_seq_len", "beta_fast", "beta_slow", "attention_factor", "truncate"),
    }
    """The settings of each type beside the factor."""

    type: Literal["linear", "llama3", "yarn"] = Field(description="The rule.")
    factor: _Positive = Field(description="By how much the context is longer than at first.")
    original_max_seq_len: Size | None = Field(
        default=None, description="Of llama3 and yarn: the context of the first training."
    )
    low_freq_factor: _Positive = Field(
        default=1.0, description="Of llama3: turns in it below which a frequency is divided."
    )
    high_freq_factor: _Positive = Field(
        default=4.0, description="Of llama3: turns in it above which one is left as it is."
    )
    beta_fast: _Positive = Field(
        default=32.0, description="Of yarn: turns in it above which one is left as it is."
    )
    beta_slow: _Positive = Field(
        default=1.0, description="Of yarn: turns in it below which a frequency is divided."
    )
    attention_factor: _Positive | None = Field(
        default=None,
        description="Of yarn: the factor on queries and keys; without it 0.1 ln(factor) + 1.",
    )
    truncate: bool = Field(
        default=True, description="Of yarn: round the range between the two to whole pairs."
    )

    def faults(self) -> Iterator[tuple[str, str, str]]:
        """What does not go together: the key, what is wrong, and the remedy."""
        if self.type != "linear" and self.original_max_seq_len is None:
            message = f"{self.type} needs the context of the first training"
            yield "original_max_seq_len", message, "give its number of tokens"
        if self.type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            message = f"{self.low_freq_factor:g} is not below high_freq_factor"
            yield "low_freq_factor", message, "the usual ones are 1 and 4"
        if self.type == "yarn" and self.beta_slow >= self.beta_fast:
            message = f"{self.beta_slow:g} is not below beta_fast"
            yield "beta_slow", message, "the usual ones are 1 and 32"

    def inactive(self) -> Iterator[Inactive]:
        """Settings of other types."""
        read, key = self.OF_TYPE[self.type], f"{self.SECTION}.type"
        for name in type(self).model_fields:
            if name not in (*read, "type", "factor"):
                yield Inactive(f"{self.SECTION}.{name}", f"{key} is {self.type}", (key,))


class RoPESettings(Section):
    """``model.rope``: rotary position embedding."""

    theta: Annotated[float, Field(gt=1, le=1e12)] = Field(
        default=10_000.0, description="Base of the frequencies; larger for longer texts."
    )
    scaling: RoPEScaling | None = Field(
        default=None, description="Change the frequencies for longer texts; without it they stay."
    )

    def inactive(self) -> Iterator[Inactive]:
        """Settings that have no effect beside others."""
        if self.scaling is not None:
            yield from self.scaling.inactive()


class PositionProvider(Provider):
    """Tells a model where its tokens stand, in one of two places.

    A rotary scheme gives each attention layer a module that turns queries and keys; a learned or
    fixed embedding gives the backbone a module whose result is added to the token embeddings. A
    provider implements one of the two; what it leaves out stays None.
    """

    def create_rotary(self, head_dim: int, max_seq_len: int) -> nn.Module | None:
        """A module ``rotary(x, positions=None)`` that turns x [B, T, H, head_dim], or None.

        ``positions`` is int64 [T] or [B, T]; by default 0..T-1. Its ``plain()``, if it has one, is
        a :class:`~apt_core.providers.plain.PlainRope`. Raises ValueError for a width that cannot be
        turned.
        """
        return None

    def create_embedding(self, d_model: int, max_seq_len: int) -> nn.Module | None:
        """A module ``embedding(positions)``, int64 [T] or [B, T] to [..., d_model], or None.

        Positions are below ``max_seq_len``: the backbone checks lengths, for the module could only
        by reading the tensor. Raises ValueError for sizes that cannot be built.
        """
        return None
