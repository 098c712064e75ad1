"""The experts' computation on a CPU: the forward of all in one operator, the backward in another.

Autograd over single operations would keep and fill more than is needed: here the products write
into slices of one tensor, the weight gradients into their places, and the hidden units are computed
again in the backward. As operators of torch they have shapes without numbers, for torch.compile and
for models on the meta device. Legend as in :mod:`apt_plugins.moe.experts`, and P places, of which
each assignment has one and some are padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_plugins.moe.cpu_memory import gradient_like
from apt_plugins.moe.cpu_products import Group, group, most_places, multiply

aten = torch.ops.aten

BLOCK_ROWS = 512
"""What is done to each number alone is done to so many rows at once: torch shares out no less than
32,768 numbers among threads, and what is much larger leaves the processor's caches."""


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

    ``factors`` [S, F] are of the hidden units of each assignment. There is no second derivative:
    asking for one raises RuntimeError.
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
        # x, of which the rows are a copy, makes a second derivative that is asked for an error.
        ctx.save_for_backward(x, gate, up, down, factors, *kept)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_weights, d_gate, d_up, d_down = torch.ops.apt_moe.backward(
            ctx.activation, upstream, *ctx.saved_tensors
        )
        gated = ctx.saved_tensors[1] is not None
        return None, d_x, None, d_weights, d_gate if gated else None, d_up, d_down, None


@torch.library.custom_op(
    "apt_moe::forward",
    mutates_args=(),
    device_types="cpu",
    schema="(str activation, Tensor x, Tensor indices, Tensor weights, Tensor? gate, Tensor up, "
    "Tensor down, Tensor? factors) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    """The sum [N, D], and what the backward needs.

    By place: the products with gate and up, and the SiLU of the first [P, F] (two of them are empty
    where there is no gate), the inputs and outputs [P, D], and as :func:`_places` has them the
    assignment [P] and its weight [P]. By assignment: its place [N, K]. And how many each expert has
    [E].
    """
    counts = torch.bincount(indices.flatten() + 1, minlength=len(up) + 1)[1:]
    groups = group(counts.tolist())
    order, shares, places = _places(groups, counts, indices, weights)
    used = slice(_end(groups))
    rows = x.new_empty(len(order), x.shape[1])
    torch.index_select(x, 0, order[used] // indices.shape[1], out=rows[used])
    b = x.new_empty(len(order), up.shape[1])
    a = torch.empty_like(b) if gate is not None else x.new_empty(0)
    active = torch.empty_like(a)
    outputs = torch.empty_like(rows)
    outputs[-1].zero_()
    blocks = _blocks(groups)
    scratch = x.new_empty(_most_rows(blocks), up.shape[1])
    for block in blocks:
        start, here = block[0].start, slice(block[0].start, block[-1].stop)
        for each in block:
            multiply(each.rows_of(rows), each.matrices_of(up).mT, each.rows_of(b))
            if gate is not None:
                multiply(each.rows_of(rows), each.matrices_of(gate).mT, each.rows_of(a))
        hidden = scratch[: here.stop - start]
        _activate(activation, a[here], b[here], active[here], hidden)
        if factors is not None:
            hidden.mul_(factors.index_select(0, order[here]))
        for each in block:
            multiply(each.rows_of(hidden, start), each.matrices_of(down).mT, each.rows_of(outputs))
    y = _sum_rows(outputs, places, weights)
    return y, a, b, active, rows, outputs, order, shares, places, counts


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
    number, width = most_places(indices.numel()), up.shape[1]
    return (
        torch.empty_like(x),
        x.new_empty(0) if gate is None else x.new_empty(number, width),
        x.new_empty(number, width),
        x.new_empty(0) if gate is None else x.new_empty(number, width),
        x.new_empty(number, x.shape[1]),
        x.new_empty(number, x.shape[1]),
        indices.new_empty(number),
        weights.new_empty(number),
        indices.new_empty(indices.shape),
        indices.new_empty(len(up)),
    )


@torch.library.custom_op(
    "apt_moe::backward",
    mutates_args=(),
    device_types="cpu",
    schema="(str activation, Tensor upstream, Tensor x, Tensor? gate, Tensor up, Tensor down, "
    "Tensor? factors, Tensor a, Tensor b, Tensor active, Tensor rows, Tensor outputs, "
    "Tensor order, Tensor shares, Tensor places, Tensor counts) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    activation: str,
    upstream: Tensor,
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    factors: Tensor | None,
    a: Tensor,
    b: Tensor,
    active: Tensor,
    rows: Tensor,
    outputs: Tensor,
    order: Tensor,
    shares: Tensor,
    places: Tensor,
    counts: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of x, weights, gate (empty where there is none), up and down."""
    assigned = counts.tolist()
    groups = group(assigned)
    used = slice(_end(groups))
    wanted = upstream.index_select(0, order[used] // places.shape[1])
    d_rows, d_shares = torch.empty_like(outputs), torch.zeros_like(shares)
    d_rows[-1].zero_()
    torch.mul(wanted, outputs[used], out=d_rows[used])
    torch.sum(d_rows[used], 1, dtype=shares.dtype, out=d_shares[used])
    wanted.mul_(shares[used].unsqueeze(1))
    d_gate = gradient_like(gate) if gate is not None else rows.new_empty(0)
    d_up, d_down = gradient_like(up), gradient_like(down)
    blocks = _blocks(groups)
    scratch = [rows.new_empty(_most_rows(blocks), up.shape[1]) for _ in range(3)]
    for block in blocks:
        start, here = block[0].start, slice(block[0].start, block[-1].stop)
        d_hidden, d_a, d_b = (each[: here.stop - start] for each in scratch)
        for each in block:
            multiply(each.rows_of(wanted), each.matrices_of(down), each.rows_of(d_hidden, start))
        # Until the gradient of a is known its place holds the hidden units.
        hidden = d_a
        _hidden(activation, b[here], active[here], hidden)
        if factors is not None:
            kept = factors.index_select(0, order[here])
            hidden.mul_(kept)
            d_hidden.mul_(kept)
        for each in block:
            multiply(each.rows_of(wanted).mT, each.rows_of(hidden, start), each.matrices_of(d_down))
        _hidden_backward(activation, a[here], b[here], active[here], d_hidden, d_a, d_b)
        for each in block:
            mine, to = each.rows_of(rows), each.rows_of(d_rows)
            multiply(each.rows_of(d_b, start), each.matrices_of(up), to)
            multiply(each.rows_of(d_b, start).mT, mine, each.matrices_of(d_up))
            if gate is not None:
                multiply(each.rows_of(d_a, start), each.matrices_of(gate), to, add=True)
                multiply(each.rows_of(d_a, start).mT, mine, each.matrices_of(d_gate))
    for expert, count in enumerate(assigned):
        if not count:
            for gradient in (d_gate[expert : expert + 1], d_up[expert], d_down[expert]):
                gradient.zero_()
    d_weights = d_shares.index_select(0, places.flatten()).view_as(places)
    return _sum_rows(d_rows, places), d_weights, d_gate, d_up, d_down


@_backward.register_fake
def _(
    activation: str,
    upstream: Tensor,
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    factors: Tensor | None,
    a: Tensor,
    b: Tensor,
    active: Tensor,
    rows: Tensor,
    outputs: Tensor,
    order: Tensor,
    shares: Tensor,
    places: Tensor,
    counts: Tensor,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape),
        shares.new_empty(places.shape),
        x.new_empty(0) if gate is None else torch.empty_like(gate),
        torch.empty_like(up),
        torch.empty_like(down),
    )


def _places(
    groups: list[Group], counts: Tensor, indices: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The assignment [P] and the weight [P] of each place, and the place [N, K] of each assignment.

    Padding repeats an expert's last assignment with a weight of 0. The last place, which is no
    expert's, is that of the assignments that are nobody's.
    """
    owners = torch.tensor([e for each in groups for e in each.experts], dtype=torch.long)
    sizes = torch.tensor([each.rows for each in groups for _ in each.experts], dtype=torch.long)
    ranks = torch.full((1 + len(counts),), len(owners), dtype=torch.long)
    ranks[1 + owners] = torch.arange(len(owners))
    counts = counts[owners]
    ends = counts.cumsum(0)
    sorted_ = ranks[indices.flatten() + 1].argsort(stable=True)[: int(counts.sum())]
    shifts = sizes.cumsum(0) - sizes - (ends - counts)
    taken = torch.arange(len(sorted_)) + shifts.repeat_interleave(counts)
    number = most_places(indices.numel())
    order = sorted_.new_zeros(number)
    order[: _end(groups)] = sorted_[ends - 1].repeat_interleave(sizes)
    order[taken] = sorted_
    shares = weights.new_zeros(number)
    shares[taken] = weights.flatten()[sorted_]
    places = torch.full(indices.shape, number - 1)
    places.view(-1)[sorted_] = taken
    return order, shares, places


def _end(groups: list[Group]) -> int:
    return groups[-1].stop if groups else 0


def _blocks(groups: list[Group]) -> list[list[Group]]:
    """Groups together until they are BLOCK_ROWS."""
    blocks: list[list[Group]] = []
    for each in groups:
        if not blocks or blocks[-1][-1].stop - blocks[-1][0].start >= BLOCK_ROWS:
            blocks.append([])
        blocks[-1].append(each)
    return blocks


def _most_rows(blocks: list[list[Group]]) -> int:
    return max((block[-1].stop - block[0].start for block in blocks), default=0)


def _sum_rows(rows: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """rows [P, D], of which ``places`` [N, K] says which belong to a token, to their sums [N, D],
    weighted by ``weights`` [N, K]."""
    if rows.dtype in (torch.float32, torch.float64):
        weights = None if weights is None else weights.to(rows.dtype)
        return F.embedding_bag(places, rows, mode="sum", per_sample_weights=weights)
    apart = rows.index_select(0, places.flatten()).view(*places.shape, -1)
    if weights is not None:
        apart = apart * weights.unsqueeze(-1)
    return apart.sum(1, dtype=rows.dtype)


def _activate(activation: str, a: Tensor, b: Tensor, active: Tensor, hidden: Tensor) -> None:
    """``active`` becomes the SiLU of ``a``, the product with gate where there is one, and
    ``hidden`` the hidden units of ``b``, the product with up."""
    if activation == "swiglu":
        aten.silu.out(a, out=active)
    _hidden(activation, b, active, hidden)


def _hidden(activation: str, b: Tensor, active: Tensor, hidden: Tensor) -> None:
    """``hidden`` becomes the hidden units of ``b`` and what ``active`` is."""
    if activation == "swiglu":
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
