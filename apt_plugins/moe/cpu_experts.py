"""The experts' computation on a CPU, with one operator for the forward and one for the backward.

Autograd over single operations would save and clear more memory than needed. Here products write
into slices of one tensor and weight gradients into their final places, and the backward recomputes
the hidden units. They are registered as torch operators with fake implementations, for
torch.compile and the meta device. Letters as in :mod:`apt_plugins.moe.experts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_plugins.moe.cpu_memory import gradient_like
from apt_plugins.moe.cpu_threads import do_all

aten = torch.ops.aten

MOST_ROWS = 2048
"""The number of an expert's rows that are computed at once: temporary values need memory for these
rows only, and stay in the cache."""


def assigned_on_cpu(
    activation: str,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    factors: Tensor | None,
) -> Tensor:
    """The weighted sum [N, D] of the chosen experts, of the type of ``x``, which is that of the
    parameters too.

    ``factors`` [S, F] multiply the hidden units of each assignment. A second derivative raises
    RuntimeError.
    """
    return _Assigned.apply(activation, x, indices, weights, gate, up, down, factors)


class _Assigned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: str,
        x: Tensor,
        indices: Tensor,
        weights: Tensor,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        factors: Tensor | None,
    ) -> Tensor:
        y, *kept = torch.ops.apt_moe.forward(
            activation, x, indices, weights, gate, up, down, factors
        )
        ctx.save_for_backward(x, weights, gate, up, down, factors, *kept)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_weights, d_gate, d_up, d_down = torch.ops.apt_moe.backward(
            ctx.activation, upstream, *ctx.saved_tensors
        )
        gated = ctx.saved_tensors[2] is not None
        return None, d_x, None, d_weights, d_gate if gated else None, d_up, d_down, None


@torch.library.custom_op(
    "apt_moe::forward",
    mutates_args=(),
    device_types="cpu",
    schema="(str activation, Tensor x, Tensor indices, Tensor weights, Tensor? gate, Tensor up, "
    "Tensor down, Tensor? factors) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    activation: str,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    factors: Tensor | None,
) -> tuple[Tensor, ...]:
    """The sum [N, D], and for the backward, in the order of experts: the products with gate and up
    [S, F] and the outputs [S, D]; that order [S], where in it the assignments of each token are
    [N, K], and how many each expert has, after those that are nobody's [1 + E]."""
    flat = indices.flatten()
    counts = torch.bincount(flat + 1, minlength=len(up) + 1)
    order = flat.argsort(stable=True)
    tokens = order // indices.shape[1]
    b = x.new_empty(len(order), up.shape[1])
    a = torch.empty_like(b) if gate is not None else x.new_empty(0)
    outputs = x.new_empty(len(order), x.shape[1])
    outputs[: counts[0]].zero_()
    shares = _shares(counts)

    def compute(share: _Share, scratch: Sequence[Tensor]) -> None:
        expert = share.expert
        for here in share.parts():
            rows, hidden = (t[: here.stop - here.start] for t in scratch)
            a_here, b_here = a[here], b[here]
            torch.index_select(x, 0, tokens[here], out=rows)
            torch.mm(rows, up[expert].t(), out=b_here)
            if gate is not None:
                torch.mm(rows, gate[expert].t(), out=a_here)
            _hidden(activation, a_here, b_here, hidden)
            if factors is not None:
                hidden.mul_(factors.index_select(0, order[here]))
            torch.mm(hidden, down[expert].t(), out=outputs[here])

    do_all(shares, compute, lambda: _scratch(shares, [x, b]))
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    places = places.view_as(indices)
    return _sum_rows(outputs, places, weights), a, b, outputs, order, places, counts


@_forward.register_fake
def _(
    activation: str,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    factors: Tensor | None,
) -> tuple[Tensor, ...]:
    number, width = indices.numel(), up.shape[1]
    return (
        torch.empty_like(x),
        x.new_empty(0) if gate is None else x.new_empty(number, width),
        x.new_empty(number, width),
        x.new_empty(number, x.shape[1]),
        indices.new_empty(number),
        indices.new_empty(indices.shape),
        indices.new_empty(len(up) + 1),
    )


@torch.library.custom_op(
    "apt_moe::backward",
    mutates_args=(),
    device_types="cpu",
    schema="(str activation, Tensor upstream, Tensor x, Tensor weights, Tensor? gate, Tensor up, "
    "Tensor down, Tensor? factors, Tensor a, Tensor b, Tensor outputs, Tensor order, "
    "Tensor places, Tensor counts) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    activation: str,
    upstream: Tensor,
    x: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    factors: Tensor | None,
    a: Tensor,
    b: Tensor,
    outputs: Tensor,
    order: Tensor,
    places: Tensor,
    counts: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of x, weights, gate (empty without one), up and down."""
    tokens, weight = order // places.shape[1], weights.flatten().index_select(0, order)[:, None]
    d_gate = gradient_like(gate) if gate is not None else x.new_empty(0)
    d_up, d_down = gradient_like(up), gradient_like(down)
    d_rows, d_weight = torch.empty_like(outputs), torch.empty_like(weight)
    for gradient in (d_rows, d_weight):
        gradient[: counts[0]].zero_()
    shares = _shares(counts)

    def compute(share: _Share, scratch: Sequence[Tensor]) -> None:
        expert = share.expert
        for here in share.parts():
            # The first part of a share writes the expert's gradients, the others add to them.
            add = here.start > share.first
            size = here.stop - here.start
            rows, wanted, d_hidden, d_a, d_b, active = (t[:size] for t in scratch)
            tokens_here = tokens[here]
            torch.index_select(x, 0, tokens_here, out=rows)
            torch.index_select(upstream, 0, tokens_here, out=wanted)
            a_here, b_here, d_rows_here = a[here], b[here], d_rows[here]
            torch.mul(wanted, outputs[here], out=d_rows_here)
            torch.sum(d_rows_here, 1, keepdim=True, dtype=weight.dtype, out=d_weight[here])
            wanted.mul_(weight[here])
            torch.mm(wanted, down[expert], out=d_hidden)
            # The memory of a's gradient holds the hidden units first.
            hidden = d_a
            _hidden(activation, a_here, b_here, hidden, active)
            if factors is not None:
                kept = factors.index_select(0, order[here])
                hidden.mul_(kept)
                d_hidden.mul_(kept)
            _multiply(wanted.t(), hidden, d_down[expert], add=add)
            _hidden_backward(activation, a_here, b_here, active, d_hidden, d_a, d_b)
            torch.mm(d_b, up[expert], out=d_rows_here)
            _multiply(d_b.t(), rows, d_up[expert], add=add)
            if gate is not None:
                _multiply(d_a, gate[expert], d_rows_here, add=True)
                _multiply(d_a.t(), rows, d_gate[expert], add=add)

    do_all(shares, compute, lambda: _scratch(shares, [x, x, b, b, b, b]))
    for expert in (counts[1:] == 0).nonzero().flatten().tolist():
        for gradient in (d_gate[expert : expert + 1], d_up[expert], d_down[expert]):
            gradient.zero_()
    d_weights = d_weight.flatten().index_select(0, places.flatten()).view_as(places)
    return _sum_rows(d_rows, places), d_weights, d_gate, d_up, d_down


@_backward.register_fake
def _(
    activation: str,
    upstream: Tensor,
    x: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    factors: Tensor | None,
    a: Tensor,
    b: Tensor,
    outputs: Tensor,
    order: Tensor,
    places: Tensor,
    counts: Tensor,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape),
        weights.new_empty(weights.shape),
        x.new_empty(0) if gate is None else torch.empty_like(gate),
        torch.empty_like(up),
        torch.empty_like(down),
    )


@dataclass(frozen=True)
class _Share:
    """The rows of an expert in the order of experts: from ``first`` to before ``last``."""

    expert: int
    first: int
    last: int

    @property
    def size(self) -> int:
        return self.last - self.first

    def parts(self) -> list[slice]:
        """The rows in pieces of nearly equal size, at most MOST_ROWS each."""
        number = math.ceil(self.size / MOST_ROWS)
        borders = [self.first + self.size * i // number for i in range(number + 1)]
        return [slice(*pair) for pair in pairwise(borders)]


def _shares(counts: Tensor) -> list[_Share]:
    """The shares of all experts that have rows."""
    ends = counts.cumsum(0).tolist()
    pairs = enumerate(pairwise(ends))
    return [_Share(expert, first, last) for expert, (first, last) in pairs if first < last]


def _scratch(shares: Sequence[_Share], like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors as wide as those of ``like``, with room for a part of any of ``shares``."""
    most = min(max((share.size for share in shares), default=0), MOST_ROWS)
    return [each.new_empty(most, each.shape[1]) for each in like]


def _multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
    """Write the product to ``out``, or with ``add`` add it."""
    if add:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)


def _sum_rows(rows: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """rows [S, D], of which ``places`` [N, K] says which belong to a token, to their sums [N, D],
    weighted by ``weights`` [N, K]."""
    if rows.dtype in (torch.float32, torch.float64):
        weights = None if weights is None else weights.to(rows.dtype)
        return F.embedding_bag(places, rows, mode="sum", per_sample_weights=weights)
    apart = rows.index_select(0, places.flatten()).view(*places.shape, -1)
    if weights is not None:
        apart = apart * weights.unsqueeze(-1)
    return apart.sum(1, dtype=rows.dtype)


def _hidden(
    activation: str, a: Tensor, b: Tensor, hidden: Tensor, active: Tensor | None = None
) -> None:
    """``hidden`` becomes the hidden units of ``b``, the product with up, and of ``a``, that with
    gate, and ``active`` the SiLU of ``a``, where there is a gate."""
    if activation == "swiglu":
        active = hidden if active is None else active
        aten.silu.out(a, out=active)
        torch.mul(active, b, out=hidden)
    elif activation == "relu2":
        torch.clamp_min(b, 0, out=hidden)
        hidden.mul_(hidden)
    else:
        aten.gelu.out(b, out=hidden)


def _hidden_backward(
    activation: str,
    a: Tensor,
    b: Tensor,
    active: Tensor,
    d_hidden: Tensor,
    d_a: Tensor,
    d_b: Tensor,
) -> None:
    """``d_a`` and ``d_b`` become the gradients of ``a`` and ``b``; changes ``d_hidden``."""
    if activation == "swiglu":
        torch.mul(d_hidden, active, out=d_b)
        d_hidden.mul_(b)
        aten.silu_backward.grad_input(d_hidden, a, grad_input=d_a)
    elif activation == "relu2":
        torch.clamp_min(b, 0, out=d_b)
        d_b.mul_(d_hidden).mul_(2)
    else:
        aten.gelu_backward.grad_input(d_hidden, b, grad_input=d_b)
