"""TVA, the default attention: heads that attend in a compressed space of rank R.

Shapes as in :mod:`apt_core.modeling.layers.attention`; d_h = D/H is the width of a head, R <= d_h
its rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.growth import Larger, Sizes
from apt_core.modeling.init import orthonormal_, reset_layer
from apt_core.modeling.kv_cache import KeyValueCache
from apt_core.modeling.layers.attention import SelfAttention, check_heads, visible
from apt_core.modeling.layers.attention_rows import AttentionRows
from apt_core.modeling.layers.compensator import NormalCompensator
from apt_core.modeling.row_decoding import Products, Rows, function_of
from apt_core.providers.attention import AttentionProvider, AttentionSupport, TVASettings
from apt_core.providers.base import read_settings
from apt_core.providers.plain import Beyond, PlainAttention


class TVACache(KeyValueCache):
    """A cache that also keeps the fused projections of the layer, which would cost more than the
    tokens of a decoding step. It is valid until the weights change."""

    def __init__(self, max_length: int) -> None:
        super().__init__(max_length)
        self.projections: tuple[Tensor, Tensor] | None = None
        self.compensator_reads: Tensor | None = None


class TVAAttention(SelfAttention):
    """Causal attention whose heads are compressed by V [R, d_h] and lifted by U [d_h, R].

    Definition: q, k, v = V (W x) per head, softmax(q kᵀ / sqrt(R)) v, lifted by U, then W_o. V and
    U are shared by the heads of the layer and start orthonormal. The layer computes it fused: V W
    is formed once a forward, so that one product gives q, k and v at width R, and W_o U gives the
    output; equal to the definition (:class:`FactoredTVAAttention`). It is exactly multi-head
    attention with head_dim R. RoPE turns q and k after the compression. ``options`` are those of
    :class:`SelfAttention`.
    """

    # Muon: V and U, which start orthonormal, learn better by AdamW (1.815 nats per byte after 300
    # steps, against 1.835).
    elementwise = ("compress", "lift")
    projected: ClassVar[tuple[str, ...]] = ("qkv_weight", "out_weight", "compress", "lift")

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        settings: TVASettings,
        *,
        num_kv_heads: int | None = None,
        **options: Any,
    ) -> None:
        kv_heads = check_heads(d_model, num_heads, num_kv_heads)
        rank = settings.rank_of(d_model // num_heads)
        options |= {"num_kv_heads": kv_heads, "qk_norm": settings.normalises(rank)}
        options["qk_norm_eps"] = settings.qk_norm_eps
        super().__init__(d_model, num_heads, rank, **options)
        self.rank = rank
        self.compress = nn.Parameter(torch.empty(rank, self.head_dim))
        self.lift = nn.Parameter(torch.empty(self.head_dim, rank))
        self.compensator = (
            NormalCompensator(d_model, settings.s, settings.tau) if settings.s else None
        )
        reset_layer(self)

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator | None, *, num_layers: int
    ) -> bool:
        if name in ("compress", "lift"):
            orthonormal_(tensor, generator)
        elif self.compensator is not None and name.startswith("compensator."):
            name = name.removeprefix("compensator.")
            return self.compensator.init_parameter(name, tensor, generator, num_layers=num_layers)
        else:
            return super().init_parameter(name, tensor, generator, num_layers=num_layers)
        return True

    def projections(self) -> tuple[Tensor, Tensor]:
        """V W [N*R, D] and W_o U [D, H*R]."""
        per_head = self.qkv_weight.view(-1, self.head_dim, self.d_model)
        # bmm, since the broadcast `compress @ per_head` copies the transposed per_head twice.
        qkv = torch.bmm(self.compress.expand(len(per_head), -1, -1), per_head)
        out = self.out_weight.view(-1, self.head_dim) @ self.lift
        return qkv.view(-1, self.d_model), out.view(self.d_model, -1)

    @property
    def writes_stream(self) -> tuple[str, ...]:  # type: ignore[override]
        compensator = () if self.compensator is None else ("compensator.out_weight",)
        return ("out_weight", *compensator)

    def grow(self, sizes: Sizes) -> dict[str, Larger]:
        """Take on larger ``sizes``; the rank stays. Raises ValueError for a compensator, whose
        subspace and threshold depend on the width."""
        if self.compensator is not None and sizes.d_model is not None:
            raise ValueError(
                "its compensator (model.tva.s) has a subspace of an eighth of the width and a "
                "threshold in its spreads, and cannot grow: only model.tva.s 0 can"
            )
        return super().grow(sizes)

    def plain(self) -> PlainAttention:
        """The fused layer, whose heads have the width R. Raises NotPlain without RoPE."""
        return self.plain_attention(*TVAAttention.projections(self))

    def beyond_plain(self) -> Iterator[Beyond]:
        """The compensator, if there is one."""
        if self.compensator is not None:
            what = "TVA's compensator adds gated directions to the attention"
            yield Beyond("compensator", what, self._drop_compensator)

    def _drop_compensator(self) -> None:
        self.compensator = None

    def create_cache(self, max_length: int) -> TVACache:
        return TVACache(max_length)

    def projections_for(self, cache: KeyValueCache | None) -> tuple[Tensor, Tensor]:
        if not isinstance(cache, TVACache):
            return self.projections()
        if cache.projections is None:
            cache.projections = self.projections()
        return cache.projections

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        y = super().forward(x, mask=mask, positions=positions, cache=cache)
        if self.compensator is None:
            return y
        if not isinstance(cache, TVACache):
            return y + self.compensator(x)
        if cache.compensator_reads is None:
            cache.compensator_reads = self.compensator.reads()
        return y + self.compensator(x, cache.compensator_reads)

    def rows(self, products: Products) -> Rows:
        attention = super().rows(products)
        assert isinstance(attention, AttentionRows)
        if self.compensator is not None:
            attention.added = function_of(self.compensator, products)
        return attention


class FactoredTVAAttention(TVAAttention):
    """TVA by its definition, step by step: slow, the reference for the fused layer."""

    projected = ("qkv_weight", "out_weight")

    def plain(self) -> PlainAttention:
        return super().plain()

    def projections(self) -> tuple[Tensor, Tensor]:
        return self.qkv_weight, self.out_weight

    def project(self, x: Tensor, qkv_weight: Tensor) -> Tensor:
        return F.linear(x, qkv_weight).unflatten(-1, (-1, self.head_dim)) @ self.compress.T

    def read_out(self, mixed: Tensor, out_weight: Tensor) -> Tensor:
        return F.linear((mixed @ self.lift.T).flatten(-2), out_weight)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        groups = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = q @ k.transpose(-2, -1) / self.rank**0.5
        seen = visible(q, k, mask)
        if seen is None:
            weights = scores.softmax(-1)
        else:
            weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen
        return F.dropout(weights, self.dropout, self.training) @ v


class TVAProvider(AttentionProvider):
    """``attention:tva_default``; settings as :class:`TVASettings`."""

    name = "tva_default"
    supports = AttentionSupport(cache=True, mask=True, autocast=True, compile=True)
    layer_class: type[TVAAttention] = TVAAttention

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.settings = read_settings(TVASettings, config, "model.tva")

    def create_layer(self, d_model: int, num_heads: int, **options: Any) -> nn.Module:
        layer_class = FactoredTVAAttention if self.settings.factored else self.layer_class
        return layer_class(d_model, num_heads, self.settings, **options)

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
        """FLOPs of the fused layer, without the products V W and W_o U, which are formed once per
        forward for any number of tokens."""
        rank = self.settings.rank_of(d_model // num_heads)
        heads, kv_heads = num_heads, num_kv_heads or num_heads
        projections = 2 * d_model * rank * (2 * heads + 2 * kv_heads) * seq_len
        scores = 4 * heads * rank * seq_len**2
        directions = d_model // 8 + 3 * self.settings.s if self.settings.s else 0
        return projections + scores + 2 * d_model * directions * seq_len
