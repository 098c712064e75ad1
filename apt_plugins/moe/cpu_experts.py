"""The experts' computation on a CPU: forward and backward of the whole in one function.

Autograd over single operations would keep and fill more than is needed: here the products write
into slices of one tensor, the weight gradients into their places, and the hidden units are computed
again in the backward. Legend as in :mod:`apt_plugins.moe.experts`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def assigned_on_cpu(
    activation: str,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    kept: Tensor | None,
) -> Tensor:
    """The weighted sum [N, D] of the chosen experts; all tensors have one type.

    ``kept`` [S, F] are factors on the hidden units of the assignments in the order of experts.
    """
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=len(up)).tolist()
    return _Assigned.apply(activation, counts, order, x, weights, gate, up, down, kept)


class _Assigned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: str,
        counts: list[int],
        order: Tensor,
        x: Tensor,
        weights: Tensor,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        kept: Tensor | None,
    ) -> Tensor:
        top_k = weights.shape[1]
        rows = x.index_select(0, order // top_k)
        shares = weights.flatten().index_select(0, order).unsqueeze(1)
        width = up.shape[1]
        a = None if gate is None else x.new_empty(len(order), width)
        b = x.new_empty(len(order), width)
        outputs = torch.empty_like(rows)
        scratch = x.new_empty(max(counts), width)
        for e, part in _parts(counts):
            hidden = scratch[: part.stop - part.start]
            torch.mm(rows[part], up[e].t(), out=b[part])
            if gate is not None:
                torch.mm(rows[part], gate[e].t(), out=a[part])
            _hidden(activation, None if a is None else a[part], b[part], hidden)
            hidden.mul_(shares[part])
            if kept is not None:
                hidden.mul_(kept[part])
            torch.mm(hidden, down[e].t(), out=outputs[part])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        back = back.view(-1, top_k)
        ctx.save_for_backward(rows, order, back, shares, a, b, gate, up, down, kept)
        ctx.counts, ctx.activation = counts, activation
        return _sum_rows(outputs, back)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        rows, order, back, shares, a, b, gate, up, down, kept = ctx.saved_tensors
        counts = ctx.counts
        wanted = upstream.index_select(0, order // back.shape[1])
        d_gate = None if gate is None else torch.empty_like(gate)
        d_up, d_down, d_rows = torch.empty_like(up), torch.empty_like(down), torch.empty_like(rows)
        d_shares = shares.new_empty(len(order))
        width = up.shape[1]
        scratch = [rows.new_empty(max(counts), width) for _ in range(4)]
        for e, part in _parts(counts):
            d_hidden, hidden, d_a, d_b = (s[: part.stop - part.start] for s in scratch)
            a_part = None if a is None else a[part]
            torch.mm(wanted[part], down[e], out=d_hidden)
            _hidden(ctx.activation, a_part, b[part], hidden)
            if kept is not None:
                d_hidden.mul_(kept[part])
            torch.mul(d_hidden, hidden, out=d_a)
            torch.sum(d_a, 1, out=d_shares[part])
            hidden.mul_(shares[part])
            if kept is not None:
                hidden.mul_(kept[part])
            torch.mm(wanted[part].t(), hidden, out=d_down[e])
            d_hidden.mul_(shares[part])
            _hidden_backward(ctx.activation, a_part, b[part], d_hidden, d_a, d_b)
            torch.mm(d_b.t(), rows[part], out=d_up[e])
            torch.mm(d_b, up[e], out=d_rows[part])
            if d_gate is not None:
                torch.mm(d_a.t(), rows[part], out=d_gate[e])
                d_rows[part].addmm_(d_a, gate[e])
        for e, count in enumerate(counts):
            if not count:
                for gradient in (d_gate, d_up, d_down):
                    if gradient is not None:
                        gradient[e].zero_()
        d_weights = d_shares.index_select(0, back.flatten()).view_as(back)
        d_x = _sum_rows(d_rows, back)
        return None, None, None, d_x, d_weights, d_gate, d_up, d_down, None


def _parts(counts: list[int]) -> list[tuple[int, slice]]:
    """The experts that are chosen, with their rows."""
    parts, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            parts.append((expert, slice(start, start + count)))
            start += count
    return parts


def _sum_rows(rows: Tensor, back: Tensor) -> Tensor:
    """rows [S, D], of which ``back`` [N, K] says which belong to a token, to their sums [N, D]."""
    if rows.dtype in (torch.float32, torch.float64):
        return F.embedding_bag(back, rows, mode="sum")
    return rows.index_select(0, back.flatten()).view(*back.shape, -1).sum(1)


def _hidden(activation: str, a: Tensor | None, b: Tensor, out: Tensor) -> None:
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
    activation: str, a: Tensor | None, b: Tensor, d_hidden: Tensor, d_a: Tensor, d_b: Tensor
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
