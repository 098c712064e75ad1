"""The experts' computation on a CPU: the forward of all in one operator, the backward in another.

Autograd over single operations would keep and fill more than is needed: here the products write
into slices of one tensor, the weight gradients into their places, and the hidden units are computed
again in the backward. As operators of torch they have shapes without numbers, for torch.compile and
for models on the meta device. Legend as in :mod:`apt_plugins.moe.experts`.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_plugins.moe.cpu_memory import gradient_like
from apt_plugins.moe.cpu_products import Group, group, multiply

aten = torch.ops.aten

BLOCK_ROWS = 1024
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

    ``factors`` [S, F] are of the hidden units of the assignments in the order of experts. There is
    no second derivative: asking for one raises RuntimeError.
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
    "Tensor down, Tensor? factors) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    """The sum [N, D], and for the backward: the products with gate and up [S, F], in the order of
    experts; that order [S], where in it the assignments of each token are [N, K], and how many
    each expert has, after those that are nobody's [1 + E]."""
    flat = indices.flatten()
    counts = torch.bincount(flat + 1, minlength=len(up) + 1)
    dropped, *assigned = counts.tolist()
    blocks = _blocks(group(assigned, dropped))
    order = _ranks(blocks, len(up))[flat + 1].argsort(stable=True)
    rows = x.index_select(0, order // indices.shape[1])
    shares = weights.flatten().index_select(0, order).unsqueeze(1)
    b = x.new_empty(len(order), up.shape[1])
    a = torch.empty_like(b) if gate is not None else x.new_empty(0)
    outputs = torch.empty_like(rows)
    outputs[:dropped].zero_()
    scratch = x.new_empty(_most_rows(blocks), up.shape[1])
    for block in blocks:
        start, here = block[0].start, slice(block[0].start, block[-1].stop)
        for each in block:
            multiply(rows, up.mT, each, b)
            if gate is not None:
                multiply(rows, gate.mT, each, a)
        hidden = scratch[: here.stop - start]
        _hidden(activation, a[here], b[here], hidden, hidden)
        if factors is not None:
            hidden.mul_(factors[here])
        hidden.mul_(shares[here])
        for each in block:
            multiply(scratch, down.mT, each, outputs, rows_start=start)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    places = places.view_as(indices)
    return _sum_rows(outputs, places), a, b, order, places, counts


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
        indices.new_empty(number),
        indices.new_empty(indices.shape),
        indices.new_empty(len(up) + 1),
    )


@torch.library.custom_op(
    "apt_moe::backward",
    mutates_args=(),
    device_types="cpu",
    schema="(str activation, Tensor upstream, Tensor x, Tensor weights, Tensor? gate, Tensor up, "
    "Tensor down, Tensor? factors, Tensor a, Tensor b, Tensor order, Tensor places, "
    "Tensor counts) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    order: Tensor,
    places: Tensor,
    counts: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of x, weights, gate (empty where there is none), up and down."""
    tokens = order // places.shape[1]
    rows, wanted = x.index_select(0, tokens), upstream.index_select(0, tokens)
    shares = weights.flatten().index_select(0, order).unsqueeze(1)
    d_gate = gradient_like(gate) if gate is not None else rows.new_empty(0)
    d_up, d_down = gradient_like(up), gradient_like(down)
    d_rows, d_shares = torch.empty_like(rows), torch.empty_like(shares)
    dropped, *assigned = counts.tolist()
    d_rows[:dropped].zero_()
    d_shares[:dropped].zero_()
    blocks = _blocks(group(assigned, dropped))
    scratch = [rows.new_empty(_most_rows(blocks), up.shape[1]) for _ in range(4)]
    for block in blocks:
        start, here = block[0].start, slice(block[0].start, block[-1].stop)
        for each in block:
            multiply(wanted, down, each, scratch[0], out_start=start)
        d_hidden, d_a, d_b, active = (s[: here.stop - start] for s in scratch)
        # Until the gradient of a is known its place holds the hidden units.
        hidden = d_a
        _hidden(activation, a[here], b[here], hidden, active)
        if factors is not None:
            hidden.mul_(factors[here])
        torch.mul(d_hidden, hidden, out=d_b)
        torch.sum(d_b, 1, keepdim=True, dtype=shares.dtype, out=d_shares[here])
        hidden.mul_(shares[here])
        parts = [part for each in block for part in each.parts()]
        for expert, first, last in parts:
            inside = slice(first - start, last - start)
            torch.mm(wanted[first:last].t(), hidden[inside], out=d_down[expert])
        d_hidden.mul_(shares[here])
        if factors is not None:
            d_hidden.mul_(factors[here])
        _hidden_backward(activation, a[here], b[here], active, d_hidden, d_a, d_b)
        for each in block:
            multiply(scratch[2], up, each, d_rows, rows_start=start)
            if gate is not None:
                multiply(scratch[1], gate, each, d_rows, rows_start=start, add=True)
        for expert, first, last in parts:
            inside = slice(first - start, last - start)
            torch.mm(d_b[inside].t(), rows[first:last], out=d_up[expert])
            if gate is not None:
                torch.mm(d_a[inside].t(), rows[first:last], out=d_gate[expert])
    for expert, count in enumerate(assigned):
        if not count:
            for gradient in (d_gate[expert : expert + 1], d_up[expert], d_down[expert]):
                gradient.zero_()
    d_weights = d_shares.flatten().index_select(0, places.flatten()).view_as(places)
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


def _blocks(groups: list[Group]) -> list[list[Group]]:
    """Groups together until they are BLOCK_ROWS."""
    blocks: list[list[Group]] = []
    for each in groups:
        if not blocks or blocks[-1][-1].stop - blocks[-1][0].start >= BLOCK_ROWS:
            blocks.append([])
        blocks[-1].append(each)
    return blocks


def _ranks(blocks: list[list[Group]], experts: int) -> Tensor:
    """The place [1 + E] of nobody's and of each expert's rows among all."""
    ranks = torch.zeros(1 + experts, dtype=torch.long)
    owners = [expert for each in chain.from_iterable(blocks) for expert in each.experts]
    ranks[1 + torch.tensor(owners, dtype=torch.long)] = torch.arange(1, 1 + len(owners))
    return ranks


def _most_rows(blocks: list[list[Group]]) -> int:
    return max((max(each.reach for each in block) - block[0].start for block in blocks), default=0)


def _sum_rows(rows: Tensor, places: Tensor) -> Tensor:
    """rows [S, D], of which ``places`` [N, K] says which belong to a token, to their sums."""
    if rows.dtype in (torch.float32, torch.float64):
        return F.embedding_bag(places, rows, mode="sum")
    return rows.index_select(0, places.flatten()).view(*places.shape, -1).sum(1)


def _hidden(activation: str, a: Tensor, b: Tensor, out: Tensor, active: Tensor) -> None:
    """The hidden units of ``b``, the product with up, and of ``a``, that with gate.

    ``active`` becomes the SiLU of ``a``, where there is a gate.
    """
    if activation == "swiglu":
        aten.silu.out(a, out=active)
        torch.mul(active, b, out=out)
    elif activation == "relu2":
        torch.clamp_min(b, 0, out=out)
        out.mul_(out)
    else:
        aten.gelu.out(b, out=out)


def _hidden_backward(
    activation: str,
    a: Tensor,
    b: Tensor,
    active: Tensor,
    d_hidden: Tensor,
    d_a: Tensor,
    d_b: Tensor,
) -> None:
    """The gradients of ``a`` and ``b``, with what ``active`` became; changes ``d_hidden``."""
    if activation == "swiglu":
        torch.mul(d_hidden, active, out=d_b)
        d_hidden.mul_(b)
        aten.silu_backward.grad_input(d_hidden, a, grad_input=d_a)
    elif activation == "relu2":
        torch.clamp_min(b, 0, out=d_b)
        d_b.mul_(d_hidden).mul_(2)
    else:
        aten.gelu_backward.grad_input(d_hidden, b, grad_input=d_b)
