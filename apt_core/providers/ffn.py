"""Providers of position-wise feed-forward layers (kind ``ffn``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from apt_core.providers.base import Provider
from apt_core.providers.rank import Ranked
from apt_core.sections import Section, Size
from apt_core.types import Inactive

if TYPE_CHECKING:
    from torch import nn


class VFTSettings(Ranked, Section):
    """``model.vft``: the feed-forward in a space of rank m."""

    SECTION: ClassVar[str] = "model.vft"
    WIDTH: ClassVar[str] = "the {} of model.d_model"

    r: Size = Field(default=4, description="Compression ratio: rank = d_model // r.")
    rank: Size | None = Field(default=None, description="The rank itself, in place of r.")

    def inactive(self) -> Iterator[Inactive]:
        """Settings that have no effect beside others."""
        return self.without_ratio()


class FeedForwardProvider(Provider, ABC):
    """Builds feed-forward layers, called as ``layer(x) -> [B, T, D]`` with x [B, T, D].

    Tokens do not mix. The layer adds no residual and normalises nothing before or after: the block
    does. Its ``plain()``, if it has one, is a :class:`~apt_core.providers.plain.PlainFFN` or
    :class:`~apt_core.providers.plain.PlainExperts` (see :mod:`apt_core.modeling.plain`).
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
