"""Multi-head attention, ``attention:mha``; grouped-query and multi-query by ``num_kv_heads``.

Shapes as in :mod:`apt_core.modeling.layers.attention`, with R = d_h: D/H, or as the settings
say.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from apt_core.modeling.init import reset_layer
from apt_core.modeling.layers.attention import SelfAttention, check_heads
from apt_core.providers.attention import AttentionProvider, AttentionSupport, MHASettings
from apt_core.providers.base import read_settings
from apt_core.providers.plain import PlainAttention


class MultiHeadAttention(SelfAttention):
    """softmax(q kᵀ / sqrt(d_h)) v per head (Vaswani et al. 2017), without biases.

    With K < H key and value heads, H/K query heads share each of them (GQA, Ainslie et al. 2023);
    K = 1 is multi-query attention (Shazeer 2019). ``head_dim`` is d_h, by default D/H. ``options``
    are those of :class:`SelfAttention`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        **options: Any,
    ) -> None:
        kv_heads = check_heads(d_model, num_heads, num_kv_heads, head_dim)
        width = d_model // num_heads if head_dim is None else head_dim
        options |= {"num_kv_heads": kv_heads, "head_dim": width}
        super().__init__(d_model, num_heads, width, **options)
        reset_layer(self)

    def projections(self) -> tuple[Tensor, Tensor]:
        return self.qkv_weight, self.out_weight

    def plain(self) -> PlainAttention:
        """The layer itself. Raises NotPlain without RoPE."""
        return self.plain_attention(self.qkv_weight, self.out_weight)


class MHAProvider(AttentionProvider):
    """``attention:mha``; settings as :class:`MHASettings`."""

    name = "mha"
    supports = AttentionSupport(cache=True, mask=True, autocast=True, compile=True)

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.settings = read_settings(MHASettings, config, "model.mha")

    def create_layer(self, d_model: int, num_heads: int, **options: Any) -> nn.Module:
        settings = self.settings
        return MultiHeadAttention(
            d_model,
            num_heads,
            head_dim=settings.head_dim,
            qk_norm=settings.qk_norm,
            qk_norm_eps=settings.qk_norm_eps,
            **options,
        )

    def kv_cache_bytes(
        self,
        d_model: int,
        num_heads: int,
        num_tokens: int,
        *,
        num_kv_heads: int | None = None,
        bytes_per_value: int = 2,
    ) -> int:
        width = self.settings.width_of(d_model, num_heads)
        return 2 * (num_kv_heads or num_heads) * width * num_tokens * bytes_per_value

    def flops(
        self, d_model: int, num_heads: int, seq_len: int, *, num_kv_heads: int | None = None
    ) -> int:
        width, kv_heads = self.settings.width_of(d_model, num_heads), num_kv_heads or num_heads
        projections = 4 * d_model * width * (num_heads + kv_heads) * seq_len
        return projections + 4 * num_heads * width * seq_len**2
