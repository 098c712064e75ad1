"""The cross-entropy of training and evaluation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from apt_core.data.packing.rows import IGNORED
from apt_core.types import ModelOutput


def cross_entropy_sum(output: ModelOutput, targets: Tensor) -> Tensor:
    """The cross-entropy of ``targets`` [B, T] in nats and fp32, summed over all but ignored
    ones."""
    logits, expected = output.logits.flatten(0, 1), targets.flatten()
    if logits.is_cuda and not torch.compiler.is_compiling():  # the compiler fuses it anyway
        summed: Tensor = _InParts.apply(logits, expected)
        return summed
    return F.cross_entropy(logits.float(), expected, ignore_index=IGNORED, reduction="sum")


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each of ``targets`` [B, T] by ``logits`` [B, T, V], in nats and fp32,
    0 for ignored ones; [B*T]. It has no gradient."""
    rows, expected = logits.flatten(0, 1), targets.flatten()
    size = _rows_of_a_part(rows)
    return torch.cat(
        [
            F.cross_entropy(part.float(), some, ignore_index=IGNORED, reduction="none")
            for part, some in zip(rows.split(size), expected.split(size), strict=True)
        ]
    )


PART_BYTES = 2**26
"""Bytes of a part's fp32 logits: few compared with all logits in bf16, and enough to keep a GPU
busy."""


class _InParts(torch.autograd.Function):
    """The summed cross-entropy, computed part by part: fp32 logits, probabilities and gradients
    exist for a part of the rows only, and ``logits`` [N, V] alone are saved, in their own dtype."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        rows = _rows_of_a_part(logits)
        summed = logits.new_zeros((), dtype=torch.float32)
        for part, expected in zip(logits.split(rows), targets.split(rows), strict=True):
            summed += F.cross_entropy(part.float(), expected, ignore_index=IGNORED, reduction="sum")
        return summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        rows = _rows_of_a_part(logits)
        result = torch.empty_like(logits)
        counts = targets != IGNORED
        classes, factors = targets.where(counts, 0), gradient.where(counts, 0)[:, None]
        places = torch.arange(rows, device=logits.device)
        for first in range(0, len(logits), rows):
            part = slice(first, first + rows)
            slope = torch.softmax(logits[part], -1, dtype=torch.float32)
            slope[places[: len(slope)], classes[part]] -= 1
            torch.mul(slope, factors[part], out=result[part])
        return result, None


def _rows_of_a_part(logits: Tensor) -> int:
    return max(1, PART_BYTES // (4 * logits.shape[1]))
