"""The mixture-of-experts layer that replaces a dense feed-forward.

Legend: B batch, T positions, D d_model, N = B*T tokens, E experts in each of G groups, K of them a
token in each group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apt_core.modeling import Tokens
from apt_core.modeling.growth import Larger, Sizes, grow_parts
from apt_core.modeling.plain import plain_of
from apt_core.modeling.row_decoding import (
    CalledAsEver,
    Function,
    Products,
    call_as_ever,
    function_of,
)
from apt_core.providers import Beyond, PlainExperts, PlainRouter
from apt_plugins.moe.experts import Experts

LEAST_TOTAL = 1e-12
"""If the sum of a token's remaining weights in a group is below this, they count as equal."""


class MoELayer(nn.Module):
    """y = experts(x), weighted by the ``router``, with a ``shared`` feed-forward beside them.

    With ``shared_weight`` λ the output is (1 - λ) * experts(x) + λ * shared(x), otherwise their
    sum.

    In training an expert takes at most ceil(``capacity`` * N * K / E) tokens of a forward, in their
    order, so that no token loses its expert to a later token of its sequence. There is no limit if
    ``capacity`` is None or ``limited`` False. Padding, by ``marked_tokens``, does not count as a
    token. Assignments beyond the limit are dropped, and the token's other weights in the group are
    scaled to sum to one: while the experts are equal this changes no output, except for a token
    without any expert left, whose experts give 0. ``dropout`` is the probability for the experts'
    hidden units.

    A forward in training sets ``indices`` [N, G*K], the chosen experts, and ``kept`` [N, G*K],
    False where an assignment was dropped, or None if there is no limit. ``load`` [G*E] and
    ``dropped`` (0-d) are counts for statistics, of the step ``counted_step``.
    """

    def __init__(
        self,
        router: nn.Module,
        experts: Experts,
        *,
        top_k: int,
        granularity: int = 1,
        capacity: float | None = None,
        dropout: float = 0.0,
        shared: nn.Module | None = None,
        shared_weight: float | None = None,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.top_k, self.granularity = top_k, granularity
        self.num_experts = experts.num_experts // granularity
        self.dropout, self.shared_weight = dropout, shared_weight
        self.marked_tokens: Tokens | None = None
        self.indices: Tensor | None = None
        self.kept: Tensor | None = None
        # A buffer, and so part of checkpoints: the limits outlast the plugin that has set them.
        self.register_buffer("limits", torch.empty(2))
        self.register_buffer("load", torch.empty(experts.num_experts), persistent=False)
        self.register_buffer("dropped", torch.empty(()), persistent=False)
        self._start, self._capacity, self._limited = capacity, capacity, True
        self.counted_step = 0
        self.reset_buffers()

    @property
    def writes_stream(self) -> tuple[str, ...]:
        shared = () if self.shared is None else self.shared.writes_stream
        return ("experts.down", *(f"shared.{name}" for name in shared))

    def grow(self, sizes: Sizes) -> dict[str, Larger]:
        """Take on larger ``sizes``: every expert has its share of the hidden units. Raises
        ValueError for units that cannot be divided among them."""
        of_expert = sizes
        if sizes.d_ff is not None:
            if sizes.d_ff % self.granularity:
                raise ValueError(
                    f"{sizes.d_ff} hidden units cannot be cut into the {self.granularity} equal "
                    "parts of model.moe.granularity"
                )
            of_expert = replace(sizes, d_ff=sizes.d_ff // self.granularity)
        grown = grow_parts(of_expert, experts=self.experts)
        grown |= grow_parts(sizes, shared=self.shared)
        return grown if sizes.d_model is None else grown | grow_parts(sizes, router=self.router)

    @property
    def capacity(self) -> float | None:
        return self._capacity

    @capacity.setter
    def capacity(self, value: float | None) -> None:
        # Rounded like the buffer, so that a restored value is equal.
        self._capacity = None if value is None else float(np.float32(value))
        self.limits[0].fill_(math.inf if value is None else value)

    @property
    def limited(self) -> bool:
        return self._limited

    @limited.setter
    def limited(self, value: bool) -> None:
        if value != self._limited:
            self._limited = value
            self.limits[1].fill_(value)

    def buffers_loaded(self) -> None:
        capacity, limited = self.limits.tolist()
        self._capacity = None if capacity == math.inf else capacity
        self._limited = bool(limited)

    def reset_buffers(self) -> None:
        self.capacity = self._start
        self._limited = True
        self.limits[1].fill_(1.0)
        self.load.zero_()
        self.dropped.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] to [B, T, D]."""
        tokens = x.flatten(0, -2)
        indices, weights = self.router(tokens)
        marked = self.marked_tokens
        limit = self._limit(len(tokens) if marked is None else marked.number)
        if self.training:
            self.indices = indices
            self.kept = None if limit is None else self._kept(indices, limit)
            if self.kept is not None:
                weights = self._without_dropped(weights, self.kept)
                indices = indices.masked_fill(~self.kept, -1)
        dropout = self.dropout if self.training else 0.0
        y = self.experts(tokens, indices, weights, dropout, limit).view_as(x)
        if self.shared is None:
            return y
        if self.shared_weight is None:
            return y + self.shared(x)
        return torch.lerp(y, self.shared(x), self.shared_weight)

    def decoding(self, products: Products) -> Function:
        """The layer as a function of x [N, D], for many calls with the same weights."""
        return _Decoding(self, products)

    def _limit(self, num_tokens: int) -> int | None:
        """The most of ``num_tokens`` tokens that an expert takes; None for no limit."""
        if self.capacity is None or not (self.limited and self.training):
            return None
        limit = math.ceil(self.capacity * num_tokens * self.top_k / self.num_experts)
        # A token chooses an expert at most once.
        return limit if limit < num_tokens else None

    def _kept(self, indices: Tensor, limit: int) -> Tensor:
        if self.marked_tokens is None:
            return self._within(indices, limit)
        is_token = self.marked_tokens.is_token.flatten()[:, None]
        # Padding gets an index behind all experts.
        return is_token & self._within(
            indices.masked_fill(~is_token, self.experts.num_experts), limit
        )

    def _within(self, indices: Tensor, limit: int) -> Tensor:
        ordered, order = indices.flatten().sort(stable=True)
        first = torch.searchsorted(ordered, ordered)
        places = torch.arange(len(order), device=order.device) - first
        kept = torch.empty_like(order, dtype=torch.bool).scatter_(0, order, places < limit)
        return kept.view_as(indices)

    def _without_dropped(self, weights: Tensor, kept: Tensor) -> Tensor:
        weights = weights * kept
        if self.top_k == 1:
            return weights
        sizes = (self.granularity, self.top_k)
        groups, left = weights.unflatten(-1, sizes), kept.unflatten(-1, sizes)
        total = groups.sum(-1, keepdim=True)
        # A quotient of numbers near 0 has gradients of NaN: such weights are made equal.
        large = total > LEAST_TOTAL
        even = left / left.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(large, groups / total.where(large, 1.0), even).flatten(-2)

    def plain(self) -> PlainExperts:
        """The experts of one group. Raises ValueError for finer groups, for other experts than
        SwiGLU, and for a router without a plain form."""
        experts = self.experts
        if self.granularity != 1:
            raise ValueError(f"its experts are cut into {self.granularity} groups")
        if experts.activation != "swiglu":
            raise ValueError(f"its experts are {experts.activation}, not SwiGLU")
        router = plain_of(self.router, PlainRouter)
        return PlainExperts(router, experts.gate, experts.up, experts.down)

    def beyond_plain(self) -> Iterator[Beyond]:
        """The shared expert, if there is one."""
        if self.shared is not None:
            what = "a shared expert computes every token beside the others"
            yield Beyond("shared_experts", what, partial(setattr, self, "shared", None))

    def __getstate__(self) -> dict[str, Any]:
        # A copy does not include the tensors of the last forward.
        return {**self.__dict__, "marked_tokens": None, "indices": None, "kept": None}


class _Decoding(CalledAsEver):
    """A :class:`MoELayer` as a function of x [N, D]: which experts compute depends on values, so
    that it is not compiled."""

    def __init__(self, layer: MoELayer, products: Products) -> None:
        super().__init__(layer)
        self._router, self._share = layer.router, layer.shared_weight
        self._experts = layer.experts.decoding(products)
        self._shared = None if layer.shared is None else function_of(layer.shared, products)

    def __call__(self, x: Tensor) -> Tensor:
        indices, weights = call_as_ever(self._router, x)
        y = self._experts(x, indices, weights)
        if self._shared is None:
            return y
        shared = self._shared(x)
        return y + shared if self._share is None else torch.lerp(y, shared, self._share)


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of ``model``, in their order."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]
