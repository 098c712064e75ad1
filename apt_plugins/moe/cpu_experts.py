"""The experts' computation on a CPU: the forward of all in one operator, the backward in another.

Autograd over single operations would keep and fill more than is needed: here the products write
into slices of one tensor, the weight gradients into their places, and the hidden units are computed
again in the backward. As operators of torch they have shapes without numbers, for torch.compile and
for models on the meta device. Legend as in :mod:`apt_plugins.moe.experts`.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

BLOCK_ROWS = 2048
"""What is done to each number alone is done to so many rows at once: torch shares out no less than
32,768 numbers among threads, and what is much larger leaves the processor's caches."""

FRESH_BYTES = 32 * 2**20
HUGE_PAGE = 2 * 2**20
MADV_HUGEPAGE = 14

Part = tuple[int, slice]
"""An expert and its rows."""


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
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat + 1, minlength=len(up) + 1)
    rows = x.index_select(0, order // indices.shape[1])
    shares = weights.flatten().index_select(0, order).unsqueeze(1)
    b = x.new_empty(len(order), up.shape[1])
    a = torch.empty_like(b) if gate is not None else x.new_empty(0)
    outputs = torch.empty_like(rows)
    dropped, *assigned = counts.tolist()
    outputs[:dropped].zero_()
    blocks = _blocks(assigned, dropped)
    scratch = x.new_empty(_most_rows(blocks), up.shape[1])
    for block, parts in blocks:
        for expert, part in parts:
            torch.mm(rows[part], up[expert].t(), out=b[part])
            if gate is not None:
                torch.mm(rows[part], gate[expert].t(), out=a[part])
        hidden = scratch[: block.stop - block.start]
        _hidden(activation, a[block], b[block], hidden)
        if factors is not None:
            hidden.mul_(factors[block])
        hidden.mul_(shares[block])
        for expert, part in parts:
            torch.mm(hidden[_within(part, block)], down[expert].t(), out=outputs[part])
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
    d_gate = _gradient_like(gate) if gate is not None else rows.new_empty(0)
    d_up, d_down = _gradient_like(up), _gradient_like(down)
    d_rows, d_shares = torch.empty_like(rows), torch.empty_like(shares)
    dropped, *assigned = counts.tolist()
    d_rows[:dropped].zero_()
    d_shares[:dropped].zero_()
    blocks = _blocks(assigned, dropped)
    scratch = [rows.new_empty(_most_rows(blocks), up.shape[1]) for _ in range(3)]
    for block, parts in blocks:
        d_hidden, hidden, d_b = (s[: block.stop - block.start] for s in scratch)
        for expert, part in parts:
            torch.mm(wanted[part], down[expert], out=d_hidden[_within(part, block)])
        _hidden(activation, a[block], b[block], hidden)
        if factors is not None:
            hidden.mul_(factors[block])
        torch.mul(d_hidden, hidden, out=d_b)
        torch.sum(d_b, 1, keepdim=True, dtype=shares.dtype, out=d_shares[block])
        hidden.mul_(shares[block])
        for expert, part in parts:
            torch.mm(wanted[part].t(), hidden[_within(part, block)], out=d_down[expert])
        d_hidden.mul_(shares[block])
        if factors is not None:
            d_hidden.mul_(factors[block])
        # What was the hidden units is now the gradient of a.
        d_a = hidden
        _hidden_backward(activation, a[block], b[block], d_hidden, d_a, d_b)
        for expert, part in parts:
            inside = _within(part, block)
            torch.mm(d_b[inside].t(), rows[part], out=d_up[expert])
            torch.mm(d_b[inside], up[expert], out=d_rows[part])
            if gate is not None:
                torch.mm(d_a[inside].t(), rows[part], out=d_gate[expert])
                d_rows[part].addmm_(d_a[inside], gate[expert])
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


def _blocks(assigned: list[int], start: int) -> list[tuple[slice, list[Part]]]:
    """The rows from ``start`` on, those of whole experts together until they are BLOCK_ROWS; only
    experts that have any."""
    blocks, parts, first = [], [], start
    for expert, count in enumerate(assigned):
        if count:
            parts.append((expert, slice(start, start + count)))
            start += count
        if parts and (start - first >= BLOCK_ROWS or expert == len(assigned) - 1):
            blocks.append((slice(first, start), parts))
            parts, first = [], start
    return blocks


def _most_rows(blocks: list[tuple[slice, list[Part]]]) -> int:
    return max((block.stop - block.start for block, _ in blocks), default=0)


def _within(part: slice, block: slice) -> slice:
    return slice(part.start - block.start, part.stop - block.start)


def _gradient_like(weight: Tensor) -> Tensor:
    """Memory for a gradient of ``weight``, in huge pages if it is large.

    The C library returns 32 MiB and more to the system whenever they are freed, and to be given
    pages of 4 KiB anew at every step takes longer than to write the gradient.
    """
    gradient = torch.empty_like(weight)
    if gradient.nbytes >= FRESH_BYTES and sys.platform == "linux":
        first = -(-gradient.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        last = (gradient.data_ptr() + gradient.nbytes) // HUGE_PAGE * HUGE_PAGE
        # Advice: where it is refused nothing is lost but time.
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_HUGEPAGE
        )
    return gradient


def _sum_rows(rows: Tensor, places: Tensor) -> Tensor:
    """rows [S, D], of which ``places`` [N, K] says which belong to a token, to their sums."""
    if rows.dtype in (torch.float32, torch.float64):
        return F.embedding_bag(places, rows, mode="sum")
    return rows.index_select(0, places.flatten()).view(*places.shape, -1).sum(1)


def _hidden(activation: str, a: Tensor, b: Tensor, out: Tensor) -> None:
    """The hidden units of ``b``, the product with up, and of ``a``, that with gate."""
    if activation == "swiglu":
        aten.silu.out(a, out=out)
        out.mul_(b)
    elif activation == "relu2":
        torch.clamp_min(b, 0, out=out)
        out.mul_(out)
    else:
        aten.gelu.out(b, out=out)


def _hidden_backward(
    activation: str, a: Tensor, b: Tensor, d_hidden: Tensor, d_a: Tensor, d_b: Tensor
) -> None:
    """The gradients of ``a`` and ``b``; changes ``d_hidden``."""
    if activation == "swiglu":
        aten.silu.out(a, out=d_b)
        d_b.mul_(d_hidden)
        d_hidden.mul_(b)
        aten.silu_backward.grad_input(d_hidden, a, grad_input=d_a)
    elif activation == "relu2":
        torch.clamp_min(b, 0, out=d_b)
        d_b.mul_(d_hidden).mul_(2)
    else:
        aten.gelu_backward.grad_input(d_hidden, b, grad_input=d_b)
