"""Providers of position information (kind ``position``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from apt_core.providers.base import Provider
from apt_core.sections import Section

if TYPE_CHECKING:
    from torch import nn


class RoPESettings(Section):
    """``model.rope``: rotary position embedding."""

    theta: Annotated[float, Field(gt=1, le=1e12)] = Field(
        default=10_000.0, description="Base of the frequencies; larger for longer texts."
    )


class PositionProvider(Provider):
    """Tells a model where its tokens stand, in one of two places.

    A rotary scheme gives each attention layer a module that turns queries and keys; a learned or
    fixed embedding gives the backbone a module whose result is added to the token embeddings. A
    provider implements one of the two; what it leaves out stays None.
    """

    def create_rotary(self, head_dim: int, max_seq_len: int) -> nn.Module | None:
        """A module ``rotary(x, positions=None)`` that turns x [B, T, H, head_dim], or None.

        ``positions`` is int64 [T] or [B, T]; by default 0..T-1. Raises ValueError for a width
        that cannot be turned.
        """
        return None

    def create_embedding(self, d_model: int, max_seq_len: int) -> nn.Module | None:
        """A module ``embedding(positions)``, int64 [T] or [B, T] to [..., d_model], or None.

        Positions are below ``max_seq_len``: the backbone checks lengths, for the module could only
        by reading the tensor. Raises ValueError for sizes that cannot be built.
        """
        return None
