"""Providers of self-attention layers (kind ``attention``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

from apt_core.providers.base import Provider

if TYPE_CHECKING:
    from torch import Tensor, nn

    from apt_core.providers.position import PositionProvider


class KeyValueCache(Protocol):
    """What a layer needs of a cache: one object a layer, filled from left to right."""

    @property
    def length(self) -> int:
        """How many positions the cache holds."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``key`` and ``value`` [B, H_kv, T, R]; return all that is held [B, H_kv, S, R]."""


class AttentionProvider(Provider, ABC):
    """Builds causal self-attention layers.

    The layer is called as ``layer(x, *, mask=None, positions=None, cache=None)`` with x [B, T, D]
    and returns [B, T, D]:

    - Position t sees positions 0..t only, with or without ``mask``.
    - ``mask``: boolean, True where attention is allowed, broadcastable to [B, H, T, S]; it narrows
      the causal rule. Every position must be left with at least one that it may see.
    - ``positions``: int64 [T] or [B, T], the place of each token in its sequence; by default
      0..T-1, or from ``cache.length`` on.
    - ``cache``: a :class:`KeyValueCache`; the layer appends its keys and values and attends to all
      that is held. Feeding a sequence in pieces gives what feeding it whole gives.
    - The layer adds no residual and normalises nothing before or after: the block does.
    - ``layer.aux``, where a layer has it, is a mapping of names to 0-d tensors of the last forward,
      to be seen in the metrics.

    A layer may define ``init_parameter`` (see :mod:`apt_core.modeling.init`).
    """

    @abstractmethod
    def create_layer(
        self,
        d_model: int,
        num_heads: int,
        *,
        max_seq_len: int = 2048,
        dropout: float = 0.0,
        position: PositionProvider | None = None,
        num_kv_heads: int | None = None,
    ) -> nn.Module:
        """A new layer of width ``d_model`` with ``num_heads`` query heads.

        ``position`` gives the layer its rotary module (none where it is None), ``num_kv_heads``
        (default: ``num_heads``) shares key and value heads among groups of query heads.
        Raises ValueError, naming the setting and the remedy, for sizes that cannot be built.
        """

    def kv_cache_bytes(
        self,
        d_model: int,
        num_heads: int,
        num_tokens: int,
        *,
        num_kv_heads: int | None = None,
        bytes_per_value: int = 2,
    ) -> int:
        """Bytes that one layer keeps to decode one sequence of ``num_tokens`` tokens.

        The default is that of multi-head attention.
        """
        width = (num_kv_heads or num_heads) * (d_model // num_heads)
        return 2 * width * num_tokens * bytes_per_value

    def flops(
        self, d_model: int, num_heads: int, seq_len: int, *, num_kv_heads: int | None = None
    ) -> int:
        """Floating-point operations of one layer's forward for one sequence of ``seq_len`` tokens.

        A multiply-add counts as two; the full T x T score matrix is counted. The default is that
        of multi-head attention.
        """
        width = (num_kv_heads or num_heads) * (d_model // num_heads)
        projections = 4 * d_model * (d_model + width) * seq_len
        return projections + 4 * d_model * seq_len**2
