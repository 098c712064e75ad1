"""The base class of the core's softmax attentions: call, checks, cache and kernel.

Shapes: B batch, T queries, S keys, D d_model, H query heads, K key and value heads, R the width at
which a head attends, N = H + 2K.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.growth import Larger, Sizes, resized
from apt_core.modeling.init import normal_, write_std
from apt_core.modeling.kv_cache import KeyValueCache
from apt_core.modeling.layers.attention_rows import AttentionRows
from apt_core.modeling.plain import plain_parts
from apt_core.modeling.row_decoding import Products, Rows
from apt_core.providers.norm import NORM_EPS
from apt_core.providers.plain import PlainAttention, PlainNorm, PlainRope
from apt_core.providers.position import PositionProvider

QK_START = 0.5
"""The initial scale of queries and keys, relative to unit variance: small, so that attention starts
uniform. With it TVA was .012 nats per byte better than with 1 on the default model (800 steps of
1,024 bytes, one seed), and with 1.5 it was .044 worse; MHA did not differ."""

QK_NORM_SCALE = 1.5
"""The initial scales of QK-norm, which make scores of order 2. The scales learn slowly: from 1
attention stays too uniform, and from 2 it starts too narrow."""


class SelfAttention(nn.Module, ABC):
    """Causal softmax attention between two projections that a subclass defines.

    ``width`` is R, at most the width d_h of a head, ``head_dim``, which is D/H unless it is given;
    ``qkv_weight`` [N*d_h, D] and ``out_weight`` [D, H*d_h] have the full width. With ``qk_norm``,
    queries and keys are RMS-normalised per head with learned scales (Henry et al. 2020, as in
    Qwen3) before RoPE.
    """

    reads_stream = ("qkv_weight",)
    writes_stream: tuple[str, ...] = ("out_weight",)
    projected: ClassVar[tuple[str, ...]] = ("qkv_weight", "out_weight")
    """The parameters that :meth:`projections` makes its matrices of, and nothing else reads."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        width: int,
        *,
        num_kv_heads: int,
        head_dim: int | None = None,
        qk_norm: bool = False,
        qk_norm_eps: float = NORM_EPS,
        max_seq_len: int = 2048,
        dropout: float = 0.0,
        position: PositionProvider | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, num_kv_heads
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        self.width, self.qk_norm_eps = width, qk_norm_eps
        self.max_seq_len, self.dropout = max_seq_len, dropout
        self.rotary = None if position is None else position.create_rotary(width, max_seq_len)
        packed_heads = num_heads + 2 * num_kv_heads
        self.qkv_weight = nn.Parameter(torch.empty(packed_heads * self.head_dim, d_model))
        self.out_weight = nn.Parameter(torch.empty(d_model, num_heads * self.head_dim))
        self.q_norm = nn.RMSNorm(width, eps=qk_norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(width, eps=qk_norm_eps) if qk_norm else None
        # Muon treats every head as a matrix (MHA after 300 steps: 1.740 nats per byte, compared
        # with 1.807 as one matrix and 1.783 as three).
        self.stacked = {"qkv_weight": packed_heads}

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator | None, *, num_layers: int
    ) -> bool:
        if name == "qkv_weight":
            normal_(tensor, self.d_model**-0.5, generator)
            values = self.num_kv_heads * len(tensor) // (self.num_heads + 2 * self.num_kv_heads)
            tensor[:-values] *= QK_START
        elif name == "out_weight":
            normal_(tensor, write_std(tensor.shape[1], num_layers), generator)
        elif name in ("q_norm.weight", "k_norm.weight"):
            tensor.fill_(QK_NORM_SCALE)
        else:
            return False
        return True

    @abstractmethod
    def projections(self) -> tuple[Tensor, Tensor]:
        """The matrix [N*R, D] of queries of all heads, keys and values, and the output matrix
        [D, H*R]."""

    def projections_for(self, cache: KeyValueCache | None) -> tuple[Tensor, Tensor]:
        """:meth:`projections`, or what ``cache`` keeps of them where they cost something to form.

        Asked inside the forward, where sharded parameters are whole."""
        return self.projections()

    def create_cache(self, max_length: int) -> KeyValueCache:
        """A cache for decoding up to ``max_length`` tokens."""
        return KeyValueCache(max_length)

    def checked_mask(self, mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """``mask`` as :meth:`attend` takes it. Raises ValueError if it does not fit [B, H, T, S],
        which is ``shape``."""
        return check_mask(mask, shape)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x [B, T, D] to [B, T, D]; see :class:`~apt_core.providers.attention.AttentionProvider`.

        Raises ValueError for a sequence longer than ``max_seq_len`` and for a mask that is not
        boolean or does not broadcast to [B, H, T, S].
        """
        batch, length, _ = x.shape
        if not (cache is None or hasattr(cache, "append")):
            raise ValueError(
                f"a {type(cache).__name__} is the cache of another layer, and not what "
                f"{type(self).__name__}.create_cache gives"
            )
        start = 0 if cache is None else cache.length
        if start + length > self.max_seq_len:
            raise ValueError(
                f"a sequence of {start + length} tokens is longer than model.max_seq_len "
                f"{self.max_seq_len}: shorten it or raise the setting"
            )
        if mask is not None:
            mask = self.checked_mask(mask, (batch, self.num_heads, length, start + length))
        qkv_weight, out_weight = self.projections_for(cache)
        q_heads, kv_heads = self.num_heads, self.num_kv_heads
        qk, v = self.project(x, qkv_weight).split([q_heads + kv_heads, kv_heads], dim=2)
        if self.q_norm is not None:
            qk = F.rms_norm(qk, (self.width,), eps=self.qk_norm_eps) * self._qk_scales()
        if self.rotary is not None:
            if positions is None and start:
                positions = torch.arange(start, start + length, device=x.device)
            qk = self.rotary(qk, positions)
        # Under autocast, QK-norm's scales widen q and k: a cache would keep twice the bytes.
        q, k = qk.to(v.dtype).split([q_heads, kv_heads], dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.read_out(self.attend(q, k, v, mask).transpose(1, 2), out_weight)

    def grow(self, sizes: Sizes) -> dict[str, Larger]:
        """Take on larger ``sizes``. The width of a head stays, and so does the number of query
        heads that share keys and values; new heads attend, and are not read at first. Raises
        ValueError for numbers of heads that do not fit."""
        heads, kv_heads, width = self.num_heads, self.num_kv_heads, self.head_dim
        self.d_model = sizes.d_model or self.d_model
        self.num_heads = sizes.num_heads or heads
        self.num_kv_heads = sizes.num_kv_heads or kv_heads
        if self.num_heads * kv_heads != heads * self.num_kv_heads:
            raise ValueError(
                f"{heads // kv_heads} heads share keys and values, and {self.num_heads} heads "
                f"cannot share those of {self.num_kv_heads} in the same way"
            )
        packed = self.num_heads + 2 * self.num_kv_heads
        self.qkv_weight = resized(self.qkv_weight, packed * width, self.d_model)
        self.out_weight = resized(self.out_weight, self.d_model, self.num_heads * width)
        self.stacked = {"qkv_weight": packed}
        spans, old, new = [], 0, 0
        for before, now in ((heads, self.num_heads), *[(kv_heads, self.num_kv_heads)] * 2):
            spans.append((old * width, (old + before) * width, new * width))
            old, new = old + before, new + now
        return {
            "qkv_weight": Larger({0: "initial", 1: "initial"}, spans={0: spans}),
            "out_weight": Larger({0: "zero", 1: "zero"}),
        }

    def rows(self, products: Products) -> Rows:
        """The layer for decoding rows, with what that needs of the weights formed once."""
        qkv_weight, out_weight = self.projections()
        return AttentionRows(
            products,
            qkv_weight,
            out_weight,
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            rotary=self.rotary,
            qk_scales=None if self.q_norm is None else self._qk_scales(),
            qk_eps=self.qk_norm_eps,
            project=_own(self, "project"),
            read_out=_own(self, "read_out"),
            attend=_own(self, "attend"),
        )

    def plain_attention(self, qkv: Tensor, out: Tensor) -> PlainAttention:
        """The plain form of an attention with the :meth:`projections` ``qkv`` and ``out``."""
        widths = [heads * self.width for heads in (self.num_heads, *[self.num_kv_heads] * 2)]
        q, k, v = qkv.split(widths)
        rope = plain_parts(rotary=(self.rotary, PlainRope))["rotary"]
        q_norm, k_norm = (
            None if norm is None else PlainNorm(norm.weight, self.qk_norm_eps)
            for norm in (self.q_norm, self.k_norm)
        )
        sizes = (self.num_heads, self.num_kv_heads, self.width)
        return PlainAttention(q, k, v, out, *sizes, rope, q_norm, k_norm)

    def _qk_scales(self) -> Tensor:
        """The scales of QK-norm [H+K, R]."""
        assert self.q_norm is not None and self.k_norm is not None
        return torch.cat(
            [
                self.q_norm.weight.expand(self.num_heads, -1),
                self.k_norm.weight.expand(self.num_kv_heads, -1),
            ]
        )

    def project(self, x: Tensor, qkv_weight: Tensor) -> Tensor:
        """x [..., D] to queries, keys and values [..., N, R]."""
        return F.linear(x, qkv_weight).unflatten(-1, (-1, self.width))

    def read_out(self, mixed: Tensor, out_weight: Tensor) -> Tensor:
        """The heads' outputs [..., H, R] to [..., D]."""
        return F.linear(mixed.flatten(-2), out_weight)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [B, H, T, R], k and v [B, K, S, R] to [B, H, T, R]; the last query sees every key.

        The one method that another kernel replaces. A query that may see nothing gets zeros.
        """
        options: dict[str, Any] = {
            "dropout_p": self.dropout if self.training else 0.0,
            "enable_gqa": self.num_kv_heads != self.num_heads,
        }
        # A branch, since the comparison is symbolic under torch.compile with dynamic lengths.
        if mask is None and q.shape[2] == k.shape[2]:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible(q, k, mask), **options)


def _own(layer: SelfAttention, name: str) -> Any:
    """The method of ``layer`` if it is not that of this module's class, or None."""
    if getattr(type(layer), name) is getattr(SelfAttention, name):
        return None
    return getattr(layer, name)


def visible(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """The causal mask combined with ``mask``, boolean, broadcastable to [B, H, T, S]; None if
    nothing is masked (a single query, which is the last)."""
    length, total = q.shape[2], k.shape[2]
    if length == 1:
        return mask
    causal = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(total - length)
    return causal if mask is None else causal & mask


def check_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """``mask`` in four dimensions. Raises ValueError if it is not boolean or does not broadcast to
    ``shape`` [B, H, T, S]."""
    if mask.dtype != torch.bool:
        raise ValueError(
            f"an attention mask is boolean (True: may be seen), not {mask.dtype}; "
            "apt_core.modeling.document_mask makes one of document ids"
        )
    given = tuple(mask.shape)
    missing = (1,) * (4 - len(given))
    if len(given) > 4 or any(a not in (1, b) for a, b in zip(missing + given, shape, strict=True)):
        raise ValueError(
            f"an attention mask of shape {list(given)} does not broadcast to [B, H, T, S] = "
            f"{list(shape)}: give [T, S], [B, 1, 1, S] or [B, 1, T, S]"
        )
    return mask.view(missing + given)


def check_heads(
    d_model: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None = None
) -> int:
    """The number of key and value heads. Raises ValueError for heads that do not divide; those of a
    given ``head_dim`` need not divide ``d_model``."""
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads < 1 or d_model < 1 or (head_dim is None and d_model % num_heads):
        raise ValueError(
            f"model.d_model {d_model} is not divisible by model.num_heads {num_heads}: "
            "choose a multiple"
        )
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(
            f"model.num_heads {num_heads} is not divisible by model.num_kv_heads {kv_heads}: "
            "choose a divisor"
        )
    return kv_heads
