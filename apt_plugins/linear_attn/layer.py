"""Linear attention by the gated delta rule, as a layer.

Shapes: B rows, T tokens, D d_model, H heads, K width of a head's queries and keys, V of its values,
F = H (2K + V) channels of the convolution, W the width of its filters.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.log import get_logger
from apt_core.modeling.init import normal_, reset_layer, write_std
from apt_core.modeling.layers.attention import check_heads
from apt_core.modeling.masks import are_documents, check_documents
from apt_core.modeling.row_decoding import Products
from apt_core.providers.attention import AttentionProvider, AttentionSupport
from apt_core.providers.base import read_settings
from apt_core.providers.position import PositionProvider
from apt_plugins.linear_attn.cache import LinearCache
from apt_plugins.linear_attn.convolution import convolved
from apt_plugins.linear_attn.delta_rule import Sizes, chunked, stepped
from apt_plugins.linear_attn.fla_kernel import chunked_by_fla, missing, takes
from apt_plugins.linear_attn.gated_norm import EPS as NORM_EPS
from apt_plugins.linear_attn.gated_norm import gated_norm
from apt_plugins.linear_attn.rows import LinearRows
from apt_plugins.linear_attn.settings import ATTENTION, SECTION, LinearAttentionSettings

log = get_logger("apt.linear_attn")

FEW = 4
"""Tokens up to which they are computed one after the other where a cache has the state."""

DECAYS = 1.0, 16.0
STEPS = 1e-3, 1e-1
"""Ranges in which the gates begin, as in Mamba 2 (Dao & Gu, arXiv:2405.21060): without input the
state fades by e^(-decay * step) a token."""


STATE_BYTES = 4


class LinearAttention(nn.Module):
    """The gated delta rule between two projections (Gated DeltaNet, arXiv:2412.06464).

    Queries, keys and values pass a short convolution and SiLU. Each token has a decay
    g = -exp(``decay_log``) softplus(a + ``step_bias``) and a strength β = σ(b), twice that with
    ``negative_eigenvalues``, for each head, where a and b are ``rate_weight`` x. What the heads
    read is RMS-normalised per head with the scales ``norm_weight`` and, with ``gate``, multiplied
    by SiLU of another projection of x.

    The state of a text, in fp32, has a size that does not depend on its length. Its order is all
    that a token's place means: ``positions`` are ignored. A mask is document ids; there is no
    dropout of weights, since there are none. ``by_fla`` lets fla's kernels compute what they can.
    """

    takes_documents = True
    reads_stream = ("in_weight", "rate_weight")
    writes_stream = ("out_weight",)
    elementwise = ("rate_weight", "conv_weight")

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        key_width: int,
        value_width: int,
        conv_size: int = 4,
        gate: bool = True,
        negative_eigenvalues: bool = False,
        chunk_size: int = 64,
        max_seq_len: int = 2048,
        by_fla: bool = False,
    ) -> None:
        super().__init__()
        self.by_fla = by_fla
        self.d_model, self.num_heads = d_model, num_heads
        self.sizes = Sizes(num_heads, key_width, value_width)
        self.conv_size, self.chunk_size, self.max_seq_len = conv_size, chunk_size, max_seq_len
        self.largest_strength = 2.0 if negative_eigenvalues else 1.0
        self.channels = self.sizes.channels
        self.gate_channels = num_heads * value_width if gate else 0
        packed = self.channels + self.gate_channels
        self.in_weight = nn.Parameter(torch.empty(packed, d_model))
        self.rate_weight = nn.Parameter(torch.empty(2 * num_heads, d_model))
        self.conv_weight = nn.Parameter(torch.empty(self.channels, conv_size))
        self.decay_log = nn.Parameter(torch.empty(num_heads))
        self.step_bias = nn.Parameter(torch.empty(num_heads))
        self.norm_weight = nn.Parameter(torch.empty(value_width))
        self.out_weight = nn.Parameter(torch.empty(d_model, num_heads * value_width))
        # Muon: every head is a matrix, as in softmax attention.
        self.stacked = {"in_weight": packed // math.gcd(key_width, value_width)}
        reset_layer(self)

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator | None, *, num_layers: int
    ) -> bool:
        if name in ("in_weight", "rate_weight"):
            normal_(tensor, self.d_model**-0.5, generator)
        elif name == "conv_weight":
            bound = self.conv_size**-0.5
            tensor.uniform_(-bound, bound, generator=generator)
        elif name == "decay_log":
            tensor.uniform_(*DECAYS, generator=generator).log_()
        elif name == "step_bias":
            low, high = (math.log(step) for step in STEPS)
            step = tensor.uniform_(low, high, generator=generator).exp()
            tensor.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
        elif name == "norm_weight":
            tensor.fill_(1.0)
        elif name == "out_weight":
            normal_(tensor, write_std(tensor.shape[1], num_layers), generator)
        else:
            return False
        return True

    def create_cache(self, max_length: int) -> LinearCache:
        """A cache for decoding up to ``max_length`` tokens."""
        return LinearCache(max_length)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: LinearCache | None = None,
    ) -> Tensor:
        """x [B, T, D] to [B, T, D]; see :class:`~apt_core.providers.attention.AttentionProvider`.

        Raises ValueError for a sequence longer than ``max_seq_len``, for a mask that is not
        document ids, and for a cache of another layer.
        """
        batch, length, _ = x.shape
        start = 0 if cache is None else self._checked(cache).length
        if start + length > self.max_seq_len:
            raise ValueError(
                f"a sequence of {start + length} tokens is longer than model.max_seq_len "
                f"{self.max_seq_len}: shorten it or raise the setting"
            )
        documents = None if mask is None else self._counted(mask, batch, start, length)
        # Two products: one's gradient would be copied together from two parts.
        in_weights = self.in_weight.split([self.channels, self.gate_channels])
        inputs, gate = (F.linear(x, weight) for weight in in_weights)
        before, state = (None, None) if cache is None else cache.held(self, inputs)
        channels = convolved(inputs, self.conv_weight, before=before, documents=documents)
        g, beta = self.rates(F.linear(x, self.rate_weight))
        if state is not None and length <= FEW and documents is None:
            out, last = stepped(channels, g, beta, self.sizes, state)
        else:
            out, last = self.rule(channels, g, beta, state, documents)
        if cache is not None:
            cache.append(inputs, last, documents)
        return F.linear(self.gated(out, gate).to(x.dtype), self.out_weight)

    def rule(
        self,
        channels: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor | None,
        documents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The rule in chunks, by the kernel that computes it here; see :func:`chunked`."""
        if self.by_fla and takes(channels, self.sizes, documents):
            return chunked_by_fla(channels, g, beta, self.sizes, state)
        return chunked(
            channels, g, beta, self.sizes, state=state, documents=documents, chunk=self.chunk_size
        )

    def rows(self, products: Products) -> LinearRows:
        """The layer for decoding rows."""
        return LinearRows(self, products)

    def rates(self, rates: Tensor) -> tuple[Tensor, Tensor]:
        """g and β [..., H] of what ``rate_weight`` gives [..., 2H], at least in fp32."""
        wide = rates.to(torch.promote_types(rates.dtype, torch.float32))
        step, strength = wide.chunk(2, -1)
        g = -self.decay_log.exp() * F.softplus(step + self.step_bias)
        return g, strength.sigmoid() * self.largest_strength

    def gated(self, out: Tensor, gate: Tensor) -> Tensor:
        """What the heads read [..., H, V], normalised and gated, as [..., H*V]."""
        if self.gate_channels:
            return gated_norm(out, gate, self.norm_weight)
        normed = F.rms_norm(out, (self.sizes.values,), eps=NORM_EPS) * self.norm_weight
        return normed.flatten(-2)

    def _checked(self, cache: Any) -> LinearCache:
        if not isinstance(cache, LinearCache):
            raise ValueError(
                f"linear attention cannot take a {type(cache).__name__}, the cache of another "
                "layer: give it what its own create_cache gave"
            )
        return cache

    def _counted(self, mask: Tensor, batch: int, start: int, length: int) -> Tensor:
        """How many documents have begun up to each token [B, T], after those in the cache."""
        if not are_documents(mask):
            raise ValueError(
                "linear attention sees all that came before, and takes no boolean mask: give the "
                "number of each token's document, int64 [B, S]"
            )
        ids = check_documents(mask, batch, start + length)
        begins = torch.zeros_like(ids, dtype=torch.bool)
        begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
        return begins[:, start:].cumsum(1)


class LinearAttentionProvider(AttentionProvider):
    """``attention:linear_causal``; settings as :class:`LinearAttentionSettings`."""

    name = ATTENTION
    supports = AttentionSupport(cache=True, mask=False, autocast=True, compile=True)

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.settings = read_settings(LinearAttentionSettings, config, SECTION)
        reason = "kernel is torch" if self.settings.kernel == "torch" else missing()
        self._by_fla = not reason
        if reason and torch.cuda.is_available():
            log.info("attention:%s is computed by torch alone: %s", ATTENTION, reason)
        if self._by_fla:
            # torch.compile does not look into the package's kernels.
            self.supports = replace(type(self).supports, compile=False)  # type: ignore[misc]

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
        """A new layer. ``dropout``, ``position`` and ``num_kv_heads`` have no meaning for it."""
        settings = self.settings
        key_width = settings.key_width_of(d_model, num_heads)
        if num_kv_heads is not None:
            check_heads(num_heads, num_heads, num_kv_heads)
        return LinearAttention(
            d_model,
            settings.heads_of(num_heads),
            key_width=key_width,
            value_width=settings.value_width_of(d_model, num_heads),
            conv_size=settings.conv_size,
            gate=settings.gate,
            negative_eigenvalues=settings.negative_eigenvalues,
            chunk_size=settings.chunk_size,
            max_seq_len=max_seq_len,
            by_fla=self._by_fla,
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
        """The state in fp32 and the inputs of the convolution, for any number of tokens."""
        heads, keys, values = self._widths(d_model, num_heads)
        inputs = (self.settings.conv_size - 1) * heads * (2 * keys + values)
        return STATE_BYTES * heads * keys * values + bytes_per_value * inputs

    def flops(
        self, d_model: int, num_heads: int, seq_len: int, *, num_kv_heads: int | None = None
    ) -> int:
        """FLOPs of the projections, the convolution and the chunks' products; the inverse of a
        triangular matrix counts C³ / 3."""
        heads, keys, values = self._widths(d_model, num_heads)
        gate = values if self.settings.gate else 0
        projected = heads * (2 * keys + 2 * values + gate + 2)
        convolved = heads * (2 * keys + values) * self.settings.conv_size
        chunk = min(self.settings.chunk_size, seq_len)
        in_chunk = chunk * (3 * keys + 2 * values) + chunk**2 // 6
        states = keys * (2 * keys + 3 * values)
        return 2 * seq_len * (d_model * projected + convolved + heads * (in_chunk + states))

    def _widths(self, d_model: int, num_heads: int) -> tuple[int, int, int]:
        settings = self.settings
        widths = (
            settings.key_width_of(d_model, num_heads),
            settings.value_width_of(d_model, num_heads),
        )
        return settings.heads_of(num_heads), *widths
