"""Multi-head attention, ``attention:mha``; grouped-query and multi-query by ``num_kv_heads``.

Shapes as in :mod:`apt_core.modeling.layers.attention`, with R = d_h = D/H.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from apt_core.modeling.init import reset_layer
from apt_core.modeling.layers.attention import SelfAttention, check_heads
from apt_core.providers.attention import AttentionProvider, AttentionSupport, MHASettings
from apt_core.providers.base import read_settings
from apt_core.providers.position import PositionProvider


class MultiHeadAttention(SelfAttention):
    """softmax(q kᵀ / sqrt(d_h)) v per head (Vaswani et al. 2017), without biases.

    With K < H key and value heads, H/K query heads share each of them (GQA, Ainslie et al. 2023);
    K = 1 is multi-query attention (Shazeer 2019).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        max_seq_len: int = 2048,
        dropout: float = 0.0,
        position: PositionProvider | None = None,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
    ) -> None:
        kv_heads = check_heads(d_model, num_heads, num_kv_heads)
        super().__init__(
            d_model,
            num_heads,
            d_model // num_heads,
            max_seq_len=max_seq_len,
            dropout=dropout,
            position=position,
            num_kv_heads=kv_heads,
            qk_norm=qk_norm,
        )
        reset_layer(self)

    def projections(self) -> tuple[Tensor, Tensor]:
        return self.qkv_weight, self.out_weight


class MHAProvider(AttentionProvider):
    """``attention:mha``; settings as :class:`MHASettings`."""

    name = "mha"
    supports = AttentionSupport(cache=True, mask=True, autocast=True, compile=True)

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.settings = read_settings(MHASettings, config, "model.mha")

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
        return MultiHeadAttention(
            d_model,
            num_heads,
            max_seq_len=max_seq_len,
            dropout=dropout,
            position=position,
            num_kv_heads=num_kv_heads,
            qk_norm=self.settings.qk_norm,
        )
