"""The short causal convolution of queries, keys and values: one filter a channel.

Shapes: B rows, T tokens, F channels, W the width of a filter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2**17
"""Elements that are computed together on a CPU, few enough for its caches."""


def convolved(
    x: Tensor, weight: Tensor, *, before: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    """silu(sum over w of weight[:, w] x[t - W + 1 + w]) for x [B, T, F] and ``weight`` [F, W].

    ``before`` [B, W - 1, F] stands before the first token, zeros without it. ``documents`` int64
    [B, T] counts the documents that have begun up to each token, from 0 for that of ``before``: no
    token sees another's.
    """
    reach = weight.shape[1] - 1
    if before is None:
        before = x.new_zeros(len(x), reach, x.shape[2])
    before, weight = before.to(x.dtype), weight.to(x.dtype)
    if documents is not None:
        return F.silu(_within_documents(torch.cat([before, x], 1), weight, documents))
    found: Tensor = _Convolution.apply(x, before, weight)
    return found


def _within_documents(padded: Tensor, weight: Tensor, documents: Tensor) -> Tensor:
    length, reach = documents.shape[1], weight.shape[1] - 1
    known = F.pad(documents, (reach, 0))
    total = padded[:, reach:] * weight[:, reach]
    for place in range(reach):
        same = known[:, place : place + length] == documents
        total = total + (padded[:, place : place + length] * weight[:, place]) * same[..., None]
    return total


class _Convolution(torch.autograd.Function):
    """silu of the convolution of x [B, T, F] after ``before`` [B, W - 1, F].

    torch's own backward of a convolution with a filter a channel takes some 30 times as long as
    its forward on a CPU. Here the gradient of x is the forward of another convolution, and all that
    is made on the way stays in the caches: a few tokens are computed at once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, before, weight)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for first, last in _blocks(x):
            out[:, first:last] = F.silu(_filtered(_padded(x, before, first, last), weight))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, before, weight = ctx.saved_tensors
        width = weight.shape[1]
        reach, flipped = width - 1, weight.flip(1)
        d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        d_later = torch.zeros_like(before)
        wide = torch.promote_types(x.dtype, torch.float32)
        d_weight = torch.zeros(width, len(weight), dtype=wide, device=x.device)
        for first, last in reversed(_blocks(x)):
            padded = _padded(x, before, first, last)
            d_linear = torch.ops.aten.silu_backward(d_out[:, first:last], _filtered(padded, weight))
            reached = torch.cat([d_linear, d_later], 1)
            d_x[:, first:last] = _filtered(reached, flipped)
            for w in range(width):
                taken = padded[:, w : w + last - first]
                d_weight[w] += (taken * d_linear).sum((0, 1), dtype=d_weight.dtype)
            d_later = reached[:, :reach]
        d_before = d_later
        if reach:
            d_before = _filtered(F.pad(d_later, (0, 0, reach, 0)), flipped)
        return d_x, d_before, d_weight.T.to(x.dtype)


def _blocks(x: Tensor) -> list[tuple[int, int]]:
    """Where the blocks of tokens of x [B, T, F] begin and end."""
    length = step = x.shape[1]
    if x.device.type == "cpu":
        step = max(16, BLOCK // (len(x) * x.shape[2]))
    return [(first, min(first + step, length)) for first in range(0, length, step)]


def _padded(x: Tensor, before: Tensor, first: int, last: int) -> Tensor:
    """Tokens ``first`` to ``last`` of x, and the W - 1 that stand before them."""
    reach = before.shape[1]
    if first >= reach:
        return x[:, first - reach : last]
    return torch.cat([before[:, first:], x[:, :last]], 1)


def _filtered(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, W - 1 + T, F] to [B, T, F]."""
    # As an image of one row, whose channels are its last dimension in memory: that is several
    # times as fast as conv1d on a CPU.
    image, filters = x.transpose(1, 2).unsqueeze(2), weight[:, None, None, :]
    return F.conv2d(image, filters, groups=len(weight)).squeeze(2).transpose(1, 2)
