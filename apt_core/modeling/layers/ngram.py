"""Hashed n-gram embeddings of the last few tokens.

For each order n, the hash of the last n ids chooses a row of a table of fixed size, which is added
to the token's embedding, as fastText does with the characters of a word (Bojanowski et al. 2017,
arXiv:1607.04606) and the Byte Latent Transformer with bytes (Pagnoni et al. 2024,
arXiv:2412.09871). N-grams that share a row share what they learn.

Shapes: B batch, T tokens, D d_model, n an order.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.growth import Larger, Sizes, resized
from apt_core.modeling.init import reset_layer

PRIME = 2**31 - 1
FACTOR = 1_103_515_245
"""Hashes are sums of ids times powers of FACTOR, modulo PRIME: products stay below 2^62, so int64
gives the same rows on every device."""


class NgramEmbedding(nn.Module):
    """Sums one row per order; the row of an n-gram is its hash modulo the order's buckets.

    ``weight`` [sum of ``buckets``, D] holds the tables of all ``orders`` one after the other. It
    starts at zero and so changes nothing at first. Since a row is used rarely, it learns
    ``lr_scale`` times as fast as the token embeddings.
    """

    def __init__(
        self, d_model: int, orders: Sequence[int], buckets: Sequence[int], lr_scale: float = 1.0
    ) -> None:
        """Raises ValueError for orders below 2 or twice, and for other than one positive number of
        buckets an order."""
        super().__init__()
        if not orders or min(orders) < 2 or len(set(orders)) != len(orders):
            raise ValueError(
                f"model.ngram.orders must be different numbers from 2 on, not {list(orders)}"
            )
        if len(buckets) != len(orders) or min(buckets) < 1:
            raise ValueError(
                f"model.ngram.buckets must be {len(orders)} positive numbers, one an order, not "
                f"{list(buckets)}"
            )
        self.buckets = dict(zip(orders, buckets, strict=True))
        self.reach = max(orders) - 1
        self.lr_scales = {"weight": lr_scale}
        self.weight = nn.Parameter(torch.empty(sum(buckets), d_model))
        reset_layer(self)

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator | None, *, num_layers: int
    ) -> bool:
        if name != "weight":
            return False
        tensor.zero_()
        return True

    def grow(self, sizes: Sizes) -> dict[str, Larger]:
        """Take on a larger ``sizes.d_model``."""
        rows, width = self.weight.shape
        self.weight = resized(self.weight, rows, sizes.d_model or width)
        return {"weight": Larger({1: "zero"})}

    def create_cache(self, max_length: int) -> NgramCache:
        """A cache for decoding up to ``max_length`` tokens."""
        return NgramCache(max_length, self.reach)

    def rows(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        cache: NgramCache | None = None,
    ) -> Tensor:
        """The row of ``weight`` of every order, int64 [B, T, number of orders].

        The id k places back is used if ``positions`` [T] or [B, T] is at least k, by default if
        ``cache`` or ``input_ids`` has it; otherwise a symbol for the beginning of a text is used.
        """
        symbols = input_ids + 1  # 0 stands before the beginning
        length = input_ids.shape[1]
        context = F.pad(symbols, (self.reach, 0)) if cache is None else cache.append(symbols)
        hashed = symbols * FACTOR % PRIME
        found: dict[int, Tensor] = {}
        for back in range(1, self.reach + 1):
            earlier = context[:, self.reach - back : self.reach - back + length]
            if positions is not None:
                earlier = earlier.where(positions >= back, 0)
            hashed = (hashed + earlier) * FACTOR % PRIME
            if back + 1 in self.buckets:
                found[back + 1] = hashed % self.buckets[back + 1]
        rows, first = [], 0
        for order, size in self.buckets.items():
            rows.append(found[order] + first)
            first += size
        return torch.stack(rows, dim=2)

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        cache: NgramCache | None = None,
    ) -> Tensor:
        """input_ids int64 [B, T] to [B, T, D]; see :meth:`rows`."""
        rows = self.rows(input_ids, positions=positions, cache=cache)
        return F.embedding(rows, self.weight).sum(dim=2)


class NgramCache:
    """Holds the ids of a batch of growing texts, for up to ``max_length`` positions."""

    def __init__(self, max_length: int, reach: int) -> None:
        self.max_length, self.reach, self.length = max_length, reach, 0
        self._symbols: Tensor | None = None

    def append(self, symbols: Tensor) -> Tensor:
        """Add ``symbols`` [B, T]; return them with the ``reach`` before them, [B, reach + T], zeros
        before the beginning.

        Raises ValueError if there is no room, or if B differs from the first call's.
        """
        start, end = self.length, self.length + symbols.shape[1]
        if end > self.max_length:
            raise ValueError(
                f"a cache for {self.max_length} tokens cannot hold {end}: create a longer one"
            )
        if self._symbols is None:
            self._symbols = symbols.new_zeros(len(symbols), self.reach + self.max_length)
        elif len(symbols) != len(self._symbols):
            raise ValueError(
                f"a cache of {len(self._symbols)} texts cannot take {len(symbols)}: create another "
                "one"
            )
        self._symbols[:, self.reach + start : self.reach + end] = symbols
        self.length = end
        return self._symbols[:, start : self.reach + end]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache: 0 before the first ``append``, then room for ``max_length``."""
        return 0 if self._symbols is None else self._symbols.nbytes

    def truncate(self, length: int) -> None:
        """Forget what is held from position ``length`` on. Raises ValueError above ``length``."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} tokens cannot be cut to {length}")
        self.length = length

    def fork(self) -> NgramCache:
        """A cache of its own that holds the same, to continue the texts in another way."""
        other = copy.copy(self)
        if self._symbols is not None:
            other._symbols = self._symbols.clone()
        return other
