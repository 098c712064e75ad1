"""Rounds weights to integers of 8 or 4 bits with scales, and packs them.

A row [D] of a weight has a scale for each group of its elements: w ≈ scale * code. With 8 bits the
group is the row, and codes go from -127 to 127. With 4 bits they go from -8 to 7, and a scale may
be negative: that of largest size among a group's elements is at -8, as in llama.cpp's Q4_0. Scales
are rounded to bf16 before codes are chosen: what torch's kernels compute with is what is kept.

Letters: F rows, D columns, G groups of a row. Weights may have more dimensions before F.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CLIPPED = 0.95
"""The share of the largest size in a group that 4 bits reach: rounding the largest element further
costs less than wider steps for all others. Normally distributed weights in groups of 128 have a
ratio of signal to noise of 20.0 dB with .95, 19.7 with 1 and 18.6 without the negative scales."""

LEAST_GROUP = 32
"""The smallest group of 4 bits."""

LEAST_COLUMNS = 16
"""A row of 8 bits with fewer columns than this stays as it is: a scale would be a large part."""


@dataclass(frozen=True)
class Rounding:
    """Weights of ``bits``; ``group`` elements share a scale, all of a row if it is 0."""

    bits: int
    group: int = 0

    def for_width(self, width: int) -> Rounding | None:
        """The rounding of rows with ``width`` elements: ``group`` is halved until it divides that.
        None where there is none."""
        if self.bits == 8:
            return Rounding(8) if width >= LEAST_COLUMNS else None
        group = self.group
        while width % group and group > LEAST_GROUP:
            group //= 2
        return None if width % group else Rounding(4, group)

    def round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 [..., F, D] and scales bf16 [..., F, G] of ``weight`` [..., F, D]."""
        groups = weight.detach().float().unflatten(-1, (-1, self.group or weight.shape[-1]))
        if self.bits == 8:
            scales = groups.abs().amax(-1, keepdim=True) / 127
            low, high = -127, 127
        else:
            largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
            scales = largest * (CLIPPED / -8)
            low, high = -8, 7
        scales = scales.bfloat16()
        # A group of zeros, or one so small that its scale is 0, has codes of 0.
        divisors = torch.where(scales == 0, torch.inf, scales.float())
        codes = (groups / divisors).round_().clamp_(low, high).to(torch.int8)
        return codes.flatten(-2), scales.squeeze(-1)

    def values(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The weights fp32 [..., F, D] that codes and scales stand for."""
        size = self.group or codes.shape[-1]
        found = codes.float().unflatten(-1, (-1, size)) * scales.float()[..., None]
        return found.flatten(-2)

    def packed(self, codes: Tensor) -> Tensor:
        """Codes as they are kept: int8 [..., F, D] as they are, those of 4 bits two in a byte,
        uint8 [..., F, D/2], the first of a pair in its lower half, each plus 8."""
        if self.bits == 8:
            return codes
        raised = (codes + 8).to(torch.uint8)
        return raised[..., 0::2] | (raised[..., 1::2] << 4)

    def unpacked(self, kept: Tensor) -> Tensor:
        """The codes int8 [..., F, D] of :meth:`packed`."""
        if self.bits == 8:
            return kept
        pairs = torch.stack([kept & 15, kept >> 4], -1).flatten(-2)
        return pairs.to(torch.int8) - 8

    def fake(self, weight: Tensor) -> Tensor:
        """``weight`` with rounded values, whose gradient goes on as if it were not rounded
        (straight-through, Bengio et al., arXiv:1308.3432)."""
        with torch.no_grad():
            rounded = self.values(*self.round(weight)).to(weight.dtype)
            change = rounded - weight
        return weight + change


def signal_to_noise(weight: Tensor, rounded: Tensor) -> float:
    """10 log10 of the squares of ``weight`` over those of what rounding changed, in dB; infinite
    where it changed nothing."""
    signal, noise = (t.double().square().sum() for t in (weight, weight - rounded))
    return float(10 * torch.log10(signal / noise))
