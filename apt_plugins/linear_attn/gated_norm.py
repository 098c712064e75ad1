"""The output of linear attention: RMSNorm of each head, and a gate.

Shapes: B rows, T tokens, H heads of width V.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-5

BLOCK = 2**17
"""Elements that are computed together on a CPU, few enough for its caches."""


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of x [..., T, H, V] over V times ``weight`` [V], times silu of ``gate``
    [..., T, H*V], as [..., T, H*V]; in the type of x."""
    found: Tensor = _GatedNorm.apply(x, gate.unflatten(-1, x.shape[-2:]), weight)
    return found.flatten(-2)


class _GatedNorm(torch.autograd.Function):
    """:func:`gated_norm` for x and ``gate`` [..., T, H, V]. The backward computes all but x anew, a
    few tokens at once, so that what is made on the way stays in the caches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        out = torch.empty_like(x)
        for part, x_part, gate_part in _blocks(out, x, gate):
            normed = x_part * _factor(x_part)
            part.copy_(normed.mul_(weight).mul_(F.silu(gate_part.to(x.dtype))))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, gate, weight = ctx.saved_tensors
        d_x, d_gate = (
            torch.empty_like(x),
            torch.empty(gate.shape, dtype=gate.dtype, device=x.device),
        )
        d_weight = torch.zeros_like(weight)
        for d_x_part, d_gate_part, x_part, gate_part, d_part in _blocks(
            d_x, d_gate, x, gate, d_out
        ):
            opened = gate_part.to(x.dtype)
            factor, silu = _factor(x_part), F.silu(opened)
            normed = x_part * factor
            d_scaled = d_part * normed
            d_gate_part.copy_(torch.ops.aten.silu_backward(d_scaled * weight, opened))
            d_weight += d_scaled.mul_(silu).flatten(0, -2).sum(0)
            d_normed = silu.mul_(d_part).mul_(weight)
            along = (d_normed * normed).mean(-1, keepdim=True)
            d_x_part.copy_(d_normed.addcmul_(normed, along, value=-1).mul_(factor))
        return d_x, d_gate, d_weight


def _factor(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).add_(EPS).rsqrt_()


def _blocks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of ``tensors`` [..., T, H, V], few tokens in each."""
    x = tensors[0]
    step = length = x.shape[-3]
    if x.device.type == "cpu":
        step = max(16, BLOCK * length // max(1, x.numel()))
    return list(zip(*(tensor.split(step, -3) for tensor in tensors), strict=True))
