"""Orthogonalises batches of matrices by Newton-Schulz iterations.

The quintic x -> x (a + b x² + c x⁴) drives every singular value of a matrix of norm 1 towards 1,
with the coefficients of Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), which give
up convergence to 1 for a slope as steep as can be at zero. After five iterations singular values
that were above 0.005 of the norm lie between 0.68 and 1.21.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apt_core.device import has_native_bf16

A, B, C = 3.4445, -4.7750, 2.0315
SMALLEST_NORM = 1e-7

GRAM_RATIO = 1.5
"""Ratio of a matrix's sides above which iterating on its Gram matrix is cheaper: at ratio q, five
iterations take 2q + 17 products of squares of the shorter side instead of 10q + 5."""

GRAM_STEPS = 5
"""Iterations on a Gram matrix before it is recomputed: an eigenvalue that rounding made negative
grows by a factor of about 12 per iteration."""


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """U Vᵀ of each matrix U S Vᵀ of ``matrices`` [N, R, C], approximately; of zeros, zeros.

    Computed and returned in bf16 where the device computes natively in it, else in fp32: on CPUs
    bf16 is the slower one.
    """
    dtype = _dtype(matrices.device)
    x = matrices.to(dtype)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(SMALLEST_NORM)
    rows, columns = x.shape[-2:]
    wide = rows <= columns
    # In bf16 a Gram matrix is not precise enough for small singular values.
    if dtype == torch.float32 and max(rows, columns) > GRAM_RATIO * min(rows, columns):
        for start in range(0, steps, GRAM_STEPS):
            factor = _gram_factor(_gram(x, wide), min(GRAM_STEPS, steps - start))
            x = torch.bmm(factor, x) if wide else torch.bmm(x, factor)
        return x
    for _ in range(steps):
        gram = _gram(x, wide)
        mixed = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, *((mixed, x) if wide else (x, mixed)), beta=A)
    return x


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if has_native_bf16(device) else torch.float32


def _gram(x: Tensor, wide: bool) -> Tensor:
    """The products of each matrix with itself along its shorter side, [N, M, M]."""
    return torch.bmm(x, x.mT) if wide else torch.bmm(x.mT, x)


def _gram_factor(gram: Tensor, steps: int) -> Tensor:
    """F [N, M, M] such that F x is x after ``steps`` iterations, of the Gram matrices x xᵀ.

    An iteration multiplies x by q = a + b g + c g², and g = x xᵀ by q²: all of them polynomials of
    the first g, which commute.
    """
    factor = None
    for left in range(steps - 1, -1, -1):
        q = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        q.diagonal(dim1=-2, dim2=-1).add_(A)
        factor = q if factor is None else torch.bmm(q, factor)
        if left:
            gram = torch.bmm(torch.bmm(gram, q), q)
    assert factor is not None
    return factor
