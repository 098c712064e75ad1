"""Providers of position-wise feed-forward layers (kind ``ffn``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from apt_core.providers.base import Provider
from apt_core.sections import Section, Size
from apt_core.types import Inactive

if TYPE_CHECKING:
    from torch import nn


class VFTSettings(Section):
    """``model.vft``: the feed-forward in a space of rank m."""

    r: Size = Field(default=4, description="Compression ratio: rank = d_model // r.")
    rank: Size | None = Field(default=None, description="The rank itself, in place of r.")

    def inactive(self) -> Iterator[Inactive]:
        """Settings that have no effect beside others."""
        if self.rank is not None:
            yield Inactive("model.vft.r", "model.vft.rank takes its place", ("model.vft.rank",))

    def rank_in(self, d_model: int) -> int:
        """m for a stream of width ``d_model``: 0 where the ratio leaves none, and above ``d_model``
        where the rank is."""
        return d_model // self.r if self.rank is None else self.rank

    def rank_of(self, d_model: int) -> int:
        """:meth:`rank_in`. Raises ValueError where it would be < 1 or > D."""
        rank = self.rank_in(d_model)
        if rank < 1:
            raise ValueError(
                f"model.vft.r: a ratio of {self.r} leaves no rank of model.d_model {d_model}: "
                f"choose r <= {d_model}, or set model.vft.rank"
            )
        if rank > d_model:
            raise ValueError(
                f"model.vft.rank: {rank} is more than model.d_model {d_model}: "
                "choose a smaller rank"
            )
        return rank


class FeedForwardProvider(Provider, ABC):
    """Builds feed-forward layers, called as ``layer(x) -> [B, T, D]`` with x [B, T, D].

    Tokens do not mix. The layer adds no residual and normalises nothing before or after: the block
    does.
    """

    @abstractmethod
    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0) -> nn.Module:
        """A new layer of width ``d_model`` with ``d_ff`` hidden units.

        Raises ValueError, naming the setting and the remedy, for sizes that cannot be built.
        """

    def flops(self, d_model: int, d_ff: int, seq_len: int) -> int:
        """Floating-point operations of one layer's forward for ``seq_len`` tokens.

        Matrix products alone, a multiply-add as two. The default is that of a gated layer of three
        products: 6 * d_model * d_ff a token. Raises ValueError for sizes that cannot be built.
        """
        return 6 * d_model * d_ff * seq_len
