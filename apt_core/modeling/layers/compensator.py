"""The normal compensator of TVA: a correction from the part of a token outside a learned
subspace."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.init import normal_, orthonormal_
from apt_core.modeling.row_decoding import Function, Products


class NormalCompensator(nn.Module):
    """Adds ``s`` gated directions read from the part of a token outside a learned subspace.

    With n = RMSNorm(x) and Q [D, m] orthonormal: z = nQ, the normal part n - zQᵀ, its share
    eps = sqrt(1 - |z|²/|n|²), a gate g = sigmoid((eps - theta)/w), and

        y = (g * sigmoid(nAᵀ + b) * (normal part) Wᵀ) U

    U starts at zero, so the layer starts as if it were absent. For an isotropic token eps is close
    to sqrt(1 - m/D) with a spread of about sqrt(m / (2D(D+2))); theta = sqrt(1 - m/D) + spread *
    ``threshold`` and w = spread, where ``threshold`` is learned and starts at ``tau``. It is
    measured in spreads, so that a step of the optimizer suits every width.

    Q is ``basis`` made orthonormal in each forward (Cholesky QR, which needs no synchronisation on
    an accelerator). Tokens do not mix.
    """

    # ``basis`` is not among them: it is made orthonormal, so the size of its steps does not matter.
    reads_stream = ("normal_weight", "gate_weight")
    # Muon: each direction is learned separately, by AdamW.
    elementwise = ("normal_weight", "gate_weight", "out_weight")
    # It is made orthonormal: nothing is multiplied by it as it is.
    full_precision = ("basis",)

    def __init__(self, d_model: int, s: int, tau: float) -> None:
        super().__init__()
        self.d_model, self.s, self.tau = d_model, s, tau
        self.rank = max(1, d_model // 8)
        self.center = math.sqrt(1 - self.rank / d_model)
        self.spread = math.sqrt(self.rank / (2 * d_model * (d_model + 2)))
        self.basis = nn.Parameter(torch.empty(d_model, self.rank))
        self.normal_weight = nn.Parameter(torch.empty(s, d_model))
        self.gate_weight = nn.Parameter(torch.empty(s, d_model))
        self.gate_bias = nn.Parameter(torch.empty(s))
        self.threshold = nn.Parameter(torch.empty(1))
        self.out_weight = nn.Parameter(torch.empty(s, d_model))

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator | None, *, num_layers: int
    ) -> bool:
        if name == "basis":
            orthonormal_(tensor, generator)
        elif name in ("normal_weight", "gate_weight"):
            normal_(tensor, self.d_model**-0.5, generator)
        elif name in ("gate_bias", "out_weight"):
            tensor.zero_()
        elif name == "threshold":
            tensor.fill_(self.tau)
        else:
            return False
        return True

    def orthonormal_basis(self) -> Tensor:
        """Q [D, m], spanning what ``basis`` spans, in fp32 or wider."""
        basis = self.basis.to(torch.promote_types(self.basis.dtype, torch.float32))
        factor, _ = torch.linalg.cholesky_ex(basis.T @ basis)
        return torch.linalg.solve_triangular(factor, basis.T, upper=False).T

    def reads(self) -> Tensor:
        """The matrix [m + 2s, D] of all projections of a token, in fp32 or wider: Qᵀ, the gates,
        and the normal directions minus their components in Q."""
        q = self.orthonormal_basis()
        normal = self.normal_weight.to(q.dtype)
        return torch.cat([q.T, self.gate_weight.to(q.dtype), normal - (normal @ q) @ q.T])

    def decoding(self, products: Products) -> Function:
        """A function of x [N, D] to the correction [N, D], with :meth:`reads` computed once."""
        reads = self.reads()
        return lambda x: self.forward(x, reads)

    def forward(self, x: Tensor, reads: Tensor | None = None) -> Tensor:
        """x [B, T, D] to the correction [B, T, D] that is added to the attention's output;
        ``reads`` is an earlier result of :meth:`reads` with the same weights."""
        # The spread of eps is smaller than a step of bf16. The meta device has no autocast.
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            reads = self.reads() if reads is None else reads
            wide = torch.promote_types(x.dtype, reads.dtype)
            n = F.rms_norm(x.to(wide), (self.d_model,), eps=1e-6)
            z, gate, value = F.linear(n, reads.to(wide)).split([self.rank, self.s, self.s], dim=-1)
            share = z.square().sum(-1, keepdim=True) / n.square().sum(-1, keepdim=True).clamp_min(
                1e-6
            )
            eps = (1 - share).clamp_min(1e-6).sqrt()
            open_ = torch.sigmoid((eps - self.center) / self.spread - self.threshold.to(wide))
            gated = open_ * torch.sigmoid(gate + self.gate_bias.to(wide)) * value
            return (gated @ self.out_weight.to(wide)).to(x.dtype)
