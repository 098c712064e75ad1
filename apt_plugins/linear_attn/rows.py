"""Linear attention of growing texts: see :mod:`apt_core.modeling.row_decoding`.

Shapes as in :mod:`apt_plugins.linear_attn.layer`; R slots, B rows of a step, T new tokens a row,
N = B*T.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_core.modeling.row_decoding import Products, RowStep, doubled
from apt_plugins.linear_attn.convolution import convolved
from apt_plugins.linear_attn.delta_rule import EPS, wide


class LinearRows:
    """A ``layer``, of the class ``LinearAttention``, for decoding rows."""

    def __init__(self, layer: Any, products: Products) -> None:
        self._layer = layer
        self._project = products.of(torch.cat([layer.in_weight, layer.rate_weight]))
        self._read_out = products.of(layer.out_weight)
        self._sizes = layer.channels, layer.gate_channels, 2 * layer.num_heads
        self._filters = layer.conv_weight.detach().T.contiguous()
        self._decay = -layer.decay_log.detach().exp()
        self.cache = StateCache(
            (layer.conv_size - 1, layer.channels),
            layer.sizes,
        )

    def __call__(self, x: Tensor, step: RowStep) -> Tensor:
        """x [N, D] of the new tokens of a step's rows to [N, D]."""
        inputs, gate, rates = self._project(x).split(self._sizes, 1)
        before, state = self.cache.held(step, inputs)
        if step.length == 1:
            out = self._one(inputs, rates, before, state)
        else:
            out = self._several(inputs, rates, before, state, step)
        return self._read_out(self._layer.gated(out, gate).to(x.dtype))

    def _one(self, inputs: Tensor, rates: Tensor, before: Tensor, state: Tensor) -> Tensor:
        """What the heads read [N, H, V] after a token a row; writes to what is held."""
        layer = self._layer
        filters = self._filters.to(inputs.dtype)
        seen = torch.cat([before, inputs[:, None]], 1)
        q, k, v = layer.sizes.split(F.silu((seen * filters).sum(1)).to(state.dtype))
        if before.shape[1]:
            before.copy_(seen[:, 1:])
        qk = torch.stack([q, k], 2)
        qk = qk * (qk.square().sum(-1, keepdim=True) + EPS).rsqrt()
        q, k = qk.unbind(2)
        g, beta = layer.rates(rates)
        state.mul_(g.exp()[..., None, None])
        written = (v - (k[..., None, :] @ state).squeeze(-2)) * beta[..., None]
        state.addcmul_(k[..., None], written[..., None, :])
        return (q[..., None, :] @ state).squeeze(-2) * layer.sizes.keys**-0.5

    def _several(
        self, inputs: Tensor, rates: Tensor, before: Tensor, state: Tensor, step: RowStep
    ) -> Tensor:
        """As :meth:`_one` for several tokens a row, of which padding changes nothing."""
        layer, reach = self._layer, before.shape[1]
        size = step.batch, step.length
        inputs = inputs.unflatten(0, size)
        channels = convolved(inputs, self._filters.T, before=before)
        g, beta = (rate.unflatten(0, size) for rate in layer.rates(rates))
        whole = torch.cat([before, inputs.to(before.dtype)], 1)
        if step.tokens is None:
            kept = whole[:, step.length :]
        else:
            is_token = step.tokens.is_token
            g, beta = (rate.masked_fill(~is_token[..., None], 0) for rate in (g, beta))
            places = is_token.sum(1, keepdim=True) + torch.arange(reach, device=whole.device)
            kept = whole.gather(1, places[..., None].expand(-1, -1, whole.shape[2]))
        out, last = layer.rule(channels, g, beta, state, None)
        before.copy_(kept)
        state.copy_(last)
        return out.flatten(0, 1)


class StateCache:
    """The states of one layer for rows of texts, and the last inputs of its convolution.

    It has the methods of :class:`~apt_core.modeling.row_decoding.RowCache`, but what it holds is of
    a whole text: it cannot give the state after fewer tokens.
    """

    cuts = False

    def __init__(self, before: tuple[int, ...], state: tuple[int, ...]) -> None:
        self._shapes = before, state
        self._held: tuple[Tensor, Tensor] | None = None

    def held(self, step: RowStep, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The last inputs [B, W - 1, F] and the states [B, H, K, V] of a step's rows, views to be
        written to; zeros where a text begins."""
        if self._held is None or self._held[0].dtype != inputs.dtype:
            self._held = None
        if self._held is None or step.end > len(self._held[0]):
            self._grow(step.end, inputs)
        assert self._held is not None
        before, state = (held[step.first : step.end] for held in self._held)
        begins = step.places[:, 0] == 0
        before.masked_fill_(begins[:, None, None], 0)
        state.masked_fill_(begins[:, None, None, None], 0)
        return before, state

    def _grow(self, slots: int, like: Tensor) -> None:
        rows = 1 if self._held is None else len(self._held[0])
        rows = slots if self._held is None else doubled(rows, slots)
        dtypes = like.dtype, wide(like.dtype)
        made = [
            like.new_zeros((rows, *shape), dtype=dtype)
            for shape, dtype in zip(self._shapes, dtypes, strict=True)
        ]
        for new, old in zip(made, self._held or (), strict=False):
            new[: len(old)] = old
        self._held = made[0], made[1]

    def copy(self, source: int, to: int, length: int) -> None:
        """Copy one slot to another; ``length`` is that of the whole text."""
        if self._held is None:
            return
        if to >= len(self._held[0]):
            self._grow(to + 1, self._held[0])
        for held in self._held:
            held[to] = held[source]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange two slots."""
        for held in self._held or ():
            kept = held[one].clone()
            held[one] = held[other]
            held[other] = kept

    def erase(self, slot: int) -> None:
        """Write zeros over all of a slot."""
        for held in self._held or ():
            if slot < len(held):
                held[slot].zero_()

    @property
    def nbytes(self) -> int:
        """The bytes of all slots."""
        return sum(held.nbytes for held in self._held or ())
