"""Multi-head attention in a sliding window, ``attention:flex``.

Shapes as in :mod:`apt_core.modeling.layers.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.layers import MHAProvider, MultiHeadAttention
from apt_core.modeling.layers.attention_rows import AttentionRows
from apt_core.modeling.masks import are_documents, check_documents
from apt_core.modeling.row_decoding import Products, Rows, RowStep
from apt_core.providers.base import read_settings
from apt_core.providers.plain import Beyond, PlainAttention
from apt_plugins.flash_attn import flex_kernel
from apt_plugins.flash_attn.bands import banded_attention
from apt_plugins.flash_attn.settings import SECTION, FlexSettings
from apt_plugins.flash_attn.visibility import LastMade, Sight


class FlexAttention(MultiHeadAttention):
    """:class:`MultiHeadAttention`, with the same parameters and state dict, in a sliding window:
    a token sees itself, the ``window - 1`` tokens before it (Mistral, Jiang et al. 2023) and the
    first ``prefix`` tokens of its text or document (attention sinks, Xiao et al. 2023). ``window``
    None is no window. ``kept`` is shared by the layers of a model.

    On a GPU FlexAttention computes whole texts, and SDPA the rest, block by block: decoding,
    dropout, and everything on other devices. Time grows with the window. A boolean mask is
    computed whole by SDPA.
    """

    takes_documents = True

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        window: int | None,
        prefix: int = 0,
        kept: LastMade | None = None,
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_heads, **options)
        if window is not None and window < 1:
            raise ValueError(
                f"{SECTION}.window: a token sees at least itself, and not {window} tokens"
            )
        self.window, self.prefix = window, prefix
        self._kept = LastMade() if kept is None else kept
        self._kernel: Callable[..., Tensor] | None = None

    def checked_mask(self, mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        if are_documents(mask):
            return check_documents(mask, shape[0], shape[3])
        return super().checked_mask(mask, shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """As the inherited one; ``mask`` may be document ids [B, S]."""
        sight, total = self.sight, k.shape[2]
        if mask is None and sight.holds(total):
            return super().attend(q, k, v, None)
        dropout = self.dropout if self.training else 0.0
        options: dict[str, Any] = {"dropout_p": dropout, "enable_gqa": q.shape[1] != k.shape[1]}
        if mask is not None and not are_documents(mask):
            seen = sight.dense(mask, q.shape[2], total, q.device)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, **options)
        if flex_kernel.takes(q, k, dropout):
            if self._kernel is None and not torch.compiler.is_compiling():
                self._kernel = flex_kernel.compiled()
            kernel = {} if self._kernel is None else {"kernel": self._kernel}
            return flex_kernel.flexed_attention(q, k, v, mask, sight, self._kept, **kernel)
        return banded_attention(q, k, v, mask, sight, self._kept, **options)

    @property
    def sight(self) -> Sight:
        """What its tokens see."""
        return Sight(self.window, self.prefix)

    def plain(self) -> PlainAttention:
        """The layer itself, without its prefix. Raises NotPlain without RoPE."""
        narrow = not self.sight.holds(self.max_seq_len)
        return replace(super().plain(), window=self.window if narrow else None)

    def beyond_plain(self) -> Iterator[Beyond]:
        """The window, if there is one that does not hold all texts, and the prefix beside it."""
        if not self.sight.holds(self.max_seq_len):
            what = f"its attention sees a window of {self.window} tokens"
            yield Beyond("window", what, partial(setattr, self, "window", None))
            if self.prefix:
                what = f"its first {self.prefix} tokens stay in sight beside the window"
                yield Beyond("prefix", what, partial(setattr, self, "prefix", 0))

    def rows(self, products: Products) -> Rows:
        attention = super().rows(products)
        assert isinstance(attention, AttentionRows)
        # A derived class may attend otherwise.
        if type(self).attend is FlexAttention.attend:
            attention.attend_rows = partial(_attend_rows, self.sight, self._kept)
        return attention


def _attend_rows(
    sight: Sight, kept: LastMade, q: Tensor, k: Tensor, v: Tensor, step: RowStep
) -> Tensor:
    """q [B, H, T, R] of the new tokens of a step, k and v [B, K, S, R] to [B, H, T, R]."""
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]}
    if not step.masked and step.length > 1:
        return banded_attention(q, k, v, None, sight, kept, **options)
    first = sight.first(min(step.ends) - step.length)
    before = sight.prefix if first > sight.prefix else 0
    if not before:
        first = 0 if sight.prefix else first

    def mask() -> Tensor:
        keys = torch.arange(first, step.span, device=q.device)
        queries = step.places[:, :, None]
        seen = sight.near(step.places, keys) | ((keys < sight.prefix) & (keys <= queries))
        seen = torch.cat([seen.new_ones(*seen.shape[:2], before), seen], dim=2)
        zeros = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
        return zeros.masked_fill_(~seen, float("-inf"))[:, None]

    if first:
        k, v = (_joined(x[:, :, :before], x[:, :, first:]) for x in (k, v))
    # One token of a text sees all of what was cut out for it.
    alone = not step.masked and (before > 0 or not sight.prefix)
    seen = None if alone else step.once((sight, q.dtype), mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, **options)


def _joined(before: Tensor, window: Tensor) -> Tensor:
    return torch.cat([before, window], dim=2) if before.shape[2] else window


class FlexProvider(MHAProvider):
    """``attention:flex``; settings as :class:`FlexSettings`."""

    name = "flex"
    version = "1.0.0"
    settings: FlexSettings

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.settings = read_settings(FlexSettings, config, SECTION)
        self._kept = LastMade()

    def create_layer(self, d_model: int, num_heads: int, **options: Any) -> nn.Module:
        settings = self.settings
        return FlexAttention(
            d_model,
            num_heads,
            window=settings.window,
            prefix=settings.prefix,
            kept=self._kept,
            head_dim=settings.head_dim,
            qk_norm=settings.qk_norm,
            qk_norm_eps=settings.qk_norm_eps,
            **options,
        )

    def flops(
        self, d_model: int, num_heads: int, seq_len: int, *, num_kv_heads: int | None = None
    ) -> int:
        """Those of multi-head attention, with the score matrix as wide as window and prefix."""
        whole = super().flops(d_model, num_heads, seq_len, num_kv_heads=num_kv_heads)
        window, width = self.settings.window, self.settings.width_of(d_model, num_heads)
        seen = seq_len if window is None else min(seq_len, window + self.settings.prefix)
        return whole - 4 * num_heads * width * seq_len * (seq_len - seen)
