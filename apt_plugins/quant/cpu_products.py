"""A weight that is kept as integers and scales, and products with it on a CPU.

torch's kernels of 8 and 4 bits take x in bf16 and give bf16. What they do not cover is computed
with the same rounding of x and of the result, so that a text is the same in a batch and alone, up
to the order of sums.

Measured on Zen 4 with two threads, a [1920, 640] weight that no cache holds: one row of x takes
136 µs in fp32 by the fastest way, 103 with 8 bits and 39 with 4; 4 rows 134 and 65, and 16 rows 395
and 236, where oneDNN's layout in fp32 takes less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_core.modeling.row_decoding import Copied, Function, Order
from apt_plugins.quant.rounding import Rounding

MOST_ROWS, MOST_ROWS_SMALL, SMALL = {8: 4, 4: 8}, 8, 2**20
"""The rows of x up to which the kernel of so many bits is faster than fp32, and those for a weight
with fewer elements than ``SMALL``."""


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight [F, D]: ``kept`` codes and ``scales`` [F, G] of ``rounding``."""

    kept: Tensor
    scales: Tensor
    rounding: Rounding

    def values(self) -> Tensor:
        """The weight in fp32, which knows what it was made of."""
        found = self.rounding.values(self.rounding.unpacked(self.kept), self.scales)
        found.stored = self
        return found

    def unbound(self) -> list[StoredWeight]:
        """The weights [F, D] of one [E, F, D]."""
        pairs = zip(self.kept.unbind(), self.scales.unbind(), strict=True)
        return [StoredWeight(*pair, self.rounding) for pair in pairs]

    def joined(self, other: Any) -> StoredWeight | None:
        """The rows of both weights; None if ``other`` is another kind of weight."""
        if not isinstance(other, StoredWeight) or other.rounding != self.rounding:
            return None
        if other.kept.shape != self.kept.shape:
            return None
        kept = torch.cat([self.kept, other.kept])
        return StoredWeight(kept, torch.cat([self.scales, other.scales]), self.rounding)

    def product(
        self, order: Order | None = None, copied: Copied = lambda weight: None
    ) -> Function | None:
        """See :class:`~apt_core.modeling.row_decoding.Stored`; None for shapes that torch's
        kernels do not take. Without a copy many rows are multiplied by values that are made for
        each call."""
        kept, scales = (t if order is None else order(t) for t in (self.kept, self.scales))
        own = StoredWeight(kept, scales, self.rounding)
        kernel = own._kernel()
        if kernel is None:
            return None
        small = kept.nbytes * 8 // self.rounding.bits < SMALL
        most = MOST_ROWS_SMALL if small else MOST_ROWS[self.rounding.bits]
        many: Function | None = None
        asked = False

        def product(x: Tensor) -> Tensor:
            nonlocal many, asked
            rounded = x.bfloat16()
            if x.shape[0] <= most:
                return kernel(rounded).float()
            if not asked:
                many, asked = copied(own.values()), True
            wide = rounded.float()
            found = F.linear(wide, own.values()) if many is None else many(wide)
            return found.bfloat16().float()

        return product

    def _kernel(self) -> Function | None:
        """x bf16 [N, D] to bf16 [N, F]."""
        rows, width = self.scales.shape[0], self.kept.shape[1] * 8 // self.rounding.bits
        # For other shapes the kernel of 8 bits reads beyond the weight.
        if self.kept.device.type != "cpu" or rows % 16 or width % 32:
            return None
        if self.rounding.bits == 8:
            codes, scales = self.kept.contiguous(), self.scales[:, 0].contiguous()
            return lambda x: torch._weight_int8pack_mm(x, codes, scales)
        group = self.rounding.group
        raised = self.rounding.unpacked(self.kept).int() + 8
        packed = torch._convert_weight_to_int4pack_for_cpu(raised, 1)
        scales = self.scales.t()
        with_zeros = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()
        return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, group, with_zeros)
