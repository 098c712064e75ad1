"""TVA, the default attention: heads that attend in a compressed space of rank R.

Shapes: B batch, T queries, S keys, D d_model, H query heads, K key and value heads, d_h = D/H the
width of a head, R its rank, N = H + 2K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.errors import did_you_mean
from apt_core.modeling.init import normal_, orthonormal_, reset_layer, write_std
from apt_core.modeling.layers.compensator import NormalCompensator
from apt_core.providers.attention import AttentionProvider, KeyValueCache
from apt_core.providers.base import read_setting
from apt_core.providers.position import PositionProvider


@dataclass(frozen=True)
class TVASettings:
    """The profile's ``model.tva``: the ratio ``r`` of compression (R = d_h // r) or the ``rank``
    itself, ``s`` normal directions (0: no compensator) with their threshold ``tau``, and
    ``factored``, the reference path."""

    r: int = 4
    s: int = 1
    tau: float = 0.18
    rank: int | None = None
    factored: bool = False

    @classmethod
    def read(cls, config: Any) -> TVASettings:
        """From a mapping, an object with these attributes, or None.

        Raises ValueError for an unknown key of a mapping and for values out of range.
        """
        names = [field.name for field in fields(cls)]
        if isinstance(config, Mapping):
            for key in config:
                if key not in names:
                    raise ValueError(f"model.tva.{key}: unknown key {did_you_mean(key, names)}")
        settings = cls(
            **{field.name: read_setting(config, field.name, field.default) for field in fields(cls)}
        )
        if settings.r < 1 or settings.s < 0 or (settings.rank is not None and settings.rank < 1):
            raise ValueError(
                "model.tva: r and rank must be at least 1 and s at least 0, not "
                f"r={settings.r}, rank={settings.rank}, s={settings.s}"
            )
        return settings

    def rank_of(self, head_dim: int) -> int:
        """R for heads of width ``head_dim``. Raises ValueError where R would be < 1 or > d_h."""
        rank = head_dim // self.r if self.rank is None else self.rank
        if rank < 1:
            raise ValueError(
                f"model.tva.r: a ratio of {self.r} leaves no rank of heads that are {head_dim} "
                f"wide (model.d_model / model.num_heads): choose r <= {head_dim}, or set "
                "model.tva.rank"
            )
        if rank > head_dim:
            raise ValueError(
                f"model.tva.rank: {rank} is more than the width {head_dim} of a head "
                "(model.d_model / model.num_heads): choose a smaller rank"
            )
        return rank


class TVAAttention(nn.Module):
    """Causal attention whose heads are compressed by V [R, d_h] and lifted by U [d_h, R].

    Definition: q, k, v = V (W x) per head, softmax(q kᵀ / sqrt(R)) v, lifted by U, then W_o. V and
    U are shared by the heads of the layer and start orthonormal. The layer computes it fused: V W
    is formed once a forward, so that one product gives q, k and v at width R, and W_o U gives the
    output; equal to the definition, which ``factored`` keeps as the reference. It is exactly
    multi-head attention with head_dim R. RoPE turns q and k after the compression.
    """

    reads_stream = ("qkv_weight",)

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        settings: TVASettings,
        *,
        max_seq_len: int = 2048,
        dropout: float = 0.0,
        position: PositionProvider | None = None,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or d_model < 1 or d_model % num_heads:
            raise ValueError(
                f"model.d_model {d_model} is not divisible by model.num_heads {num_heads}: "
                "choose a multiple"
            )
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(
                f"model.num_heads {num_heads} is not divisible by model.num_kv_heads {kv_heads}: "
                "choose a divisor"
            )
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, kv_heads
        self.head_dim = d_model // num_heads
        self.rank = settings.rank_of(self.head_dim)
        self.settings, self.max_seq_len, self.dropout = settings, max_seq_len, dropout
        self.rotary = None if position is None else position.create_rotary(self.rank, max_seq_len)
        packed_heads = num_heads + 2 * kv_heads
        self.qkv_weight = nn.Parameter(torch.empty(packed_heads * self.head_dim, d_model))
        self.compress = nn.Parameter(torch.empty(self.rank, self.head_dim))
        self.lift = nn.Parameter(torch.empty(self.head_dim, self.rank))
        self.out_weight = nn.Parameter(torch.empty(d_model, d_model))
        self.compensator = (
            NormalCompensator(d_model, settings.s, settings.tau) if settings.s else None
        )
        reset_layer(self)

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator | None, *, num_layers: int
    ) -> bool:
        if name in ("compress", "lift"):
            orthonormal_(tensor, generator)
        elif name == "qkv_weight":
            normal_(tensor, self.d_model**-0.5, generator)
        elif name == "out_weight":
            normal_(tensor, write_std(self.d_model, num_layers), generator)
        elif self.compensator is not None and name.startswith("compensator."):
            name = name.removeprefix("compensator.")
            return self.compensator.init_parameter(name, tensor, generator, num_layers=num_layers)
        else:
            return False
        return True

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x [B, T, D] to [B, T, D]; see :class:`~apt_core.providers.attention.AttentionProvider`.

        Raises ValueError for a sequence longer than ``max_seq_len`` and a mask that is not boolean.
        """
        length, start = x.shape[1], 0 if cache is None else cache.length
        if start + length > self.max_seq_len:
            raise ValueError(
                f"a sequence of {start + length} tokens is longer than model.max_seq_len "
                f"{self.max_seq_len}: shorten it or raise the setting"
            )
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"an attention mask is boolean (True: may be seen), not {mask.dtype}")
        q_heads, kv_heads = self.num_heads, self.num_kv_heads
        qk, v = self._project(x).split([q_heads + kv_heads, kv_heads], dim=2)
        if self.rotary is not None:
            if positions is None and start:
                positions = torch.arange(start, start + length, device=x.device)
            qk = self.rotary(qk, positions)
        q, k = qk.split([q_heads, kv_heads], dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        mixed = self._attend_by_definition if self.settings.factored else self._attend
        y = self._output(mixed(q, k, v, mask).transpose(1, 2))
        return y if self.compensator is None else y + self.compensator(x)

    def _project(self, x: Tensor) -> Tensor:
        """x [B, T, D] to [B, T, N, R]: the queries of all heads, then the keys, then the values."""
        batch, length, _ = x.shape
        if self.settings.factored:
            full = F.linear(x, self.qkv_weight).view(batch, length, -1, self.head_dim)
            return full @ self.compress.T
        per_head = self.qkv_weight.view(-1, self.head_dim, self.d_model)
        fused = (self.compress @ per_head).view(-1, self.d_model)
        return F.linear(x, fused).view(batch, length, -1, self.rank)

    def _output(self, mixed: Tensor) -> Tensor:
        """What the heads saw, [B, T, H, R], to [B, T, D]."""
        if self.settings.factored:
            return F.linear((mixed @ self.lift.T).flatten(2), self.out_weight)
        per_head = self.out_weight.view(self.d_model, self.num_heads, self.head_dim)
        return F.linear(mixed.flatten(2), (per_head @ self.lift).flatten(1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [B, H, T, R], k and v [B, K, S, R] to [B, H, T, R]; the last query sees every key.

        The one method that another kernel replaces.
        """
        length, total = q.shape[2], k.shape[2]
        plain = mask is None and length == total
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if plain else allowed(length, total, mask, q.device),
            is_causal=plain,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )

    def _attend_by_definition(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        groups = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = q @ k.transpose(-2, -1) / self.rank**0.5
        visible = allowed(q.shape[2], k.shape[2], mask, q.device)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return F.dropout(weights, self.dropout, self.training) @ v


def allowed(length: int, total: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """Boolean [T, S] (or what ``mask`` broadcasts it to): the last query sees every key."""
    causal = torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)
    return causal if mask is None else causal & mask


class TVAProvider(AttentionProvider):
    """``attention:tva_default``; settings as :class:`TVASettings`."""

    name = "tva_default"
    layer_class: type[TVAAttention] = TVAAttention

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.settings = TVASettings.read(config)

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
        return self.layer_class(
            d_model,
            num_heads,
            self.settings,
            max_seq_len=max_seq_len,
            dropout=dropout,
            position=position,
            num_kv_heads=num_kv_heads,
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
        rank = self.settings.rank_of(d_model // num_heads)
        return 2 * (num_kv_heads or num_heads) * rank * num_tokens * bytes_per_value

    def flops(
        self, d_model: int, num_heads: int, seq_len: int, *, num_kv_heads: int | None = None
    ) -> int:
        rank = self.settings.rank_of(d_model // num_heads)
        heads, kv_heads = num_heads, num_kv_heads or num_heads
        projections = 2 * d_model * rank * (2 * heads + 2 * kv_heads) * seq_len
        scores = 4 * heads * rank * seq_len**2
        directions = d_model // 8 + 3 * self.settings.s if self.settings.s else 0
        return projections + scores + 2 * d_model * directions * seq_len
