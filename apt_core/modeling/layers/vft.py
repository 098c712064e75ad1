"""VFT: SwiGLU in a low-rank space (``ffn:vft``).

Shapes: B batch, T tokens, D d_model, F d_ff, m the rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.growth import Larger, Sizes, resize_linear, resized
from apt_core.modeling.init import normal_, orthonormal_, reset_layer, write_std
from apt_core.modeling.row_decoding import Function, Products
from apt_core.providers.base import read_settings
from apt_core.providers.ffn import FeedForwardProvider, VFTSettings
from apt_core.providers.plain import PlainFFN


class VFT(nn.Module):
    """y = U ((silu(z Gᵀ) * (z Pᵀ)) Dᵀ) with z = V x, without biases.

    V is ``compress`` [m, D], U ``lift`` [D, m], both orthonormal at the start; G and P are
    ``gate.weight`` and ``up.weight`` [F, m], D ``down.weight`` [m, F]. The layer is exactly the
    SwiGLU of :meth:`fused_weights`, whose matrices have rank m, at about m / d_model of its cost.
    """

    reads_stream = ("compress", "gate.weight", "up.weight")
    writes_stream = ("down.weight",)

    def __init__(
        self, d_model: int, d_ff: int, settings: VFTSettings, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if d_model < 1 or d_ff < 1:
            raise ValueError(
                f"model.d_model and model.d_ff must be positive, not {d_model}, {d_ff}"
            )
        self.d_model, self.d_ff, self.dropout = d_model, d_ff, dropout
        self.rank = settings.rank_of(d_model)
        self.compress = nn.Parameter(torch.empty(self.rank, d_model))
        self.gate = nn.Linear(self.rank, d_ff, bias=False)
        self.up = nn.Linear(self.rank, d_ff, bias=False)
        self.down = nn.Linear(d_ff, self.rank, bias=False)
        self.lift = nn.Parameter(torch.empty(d_model, self.rank))
        reset_layer(self)

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator | None, *, num_layers: int
    ) -> bool:
        if name in ("compress", "lift"):
            orthonormal_(tensor, generator)
        elif name in ("gate.weight", "up.weight"):
            normal_(tensor, self.rank**-0.5, generator)
        elif name == "down.weight":
            # U spreads m values over D places, so a step of Adam moves the output sqrt(m/D) times
            # as far as SwiGLU's. Its initial scale is smaller by the same factor, which was as good
            # or better after 600 steps at widths 64 and 128, and after 2,000 at 64.
            normal_(tensor, write_std(self.d_ff, num_layers), generator)
        else:
            return False
        return True

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] to [B, T, D]; tokens do not mix."""
        z = F.linear(x, self.compress)
        hidden = F.silu(self.gate(z)) * self.up(z)
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout, self.training)
        return F.linear(self.down(hidden), self.lift)

    def grow(self, sizes: Sizes) -> dict[str, Larger]:
        """Take on larger ``sizes``; the rank stays."""
        self.d_model, self.d_ff = sizes.d_model or self.d_model, sizes.d_ff or self.d_ff
        self.compress = resized(self.compress, self.rank, self.d_model)
        self.lift = resized(self.lift, self.d_model, self.rank)
        for linear in (self.gate, self.up):
            resize_linear(linear, self.d_ff, self.rank)
        resize_linear(self.down, self.rank, self.d_ff)
        return {
            "compress": Larger({1: "initial"}),
            "gate.weight": Larger({0: "initial"}),
            "up.weight": Larger({0: "initial"}),
            "down.weight": Larger({1: "zero"}),
            "lift": Larger({0: "zero"}),
        }

    def decoding(self, products: Products) -> Function:
        """The layer as a function of x [N, D], for many calls with the same weights."""
        compress, lift = products.of(self.compress), products.of(self.lift)
        gate, up = products.of(self.gate.weight), products.of(self.up.weight)
        down = products.of(self.down.weight)

        def computed(x: Tensor) -> Tensor:
            z = compress(x)
            return lift(down(F.silu(gate(z)) * up(z)))

        return computed

    def fused_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """(gate [F, D], up [F, D], down [D, F]) of the SwiGLU, or Llama's MLP, that is equal."""
        return (
            self.gate.weight @ self.compress,
            self.up.weight @ self.compress,
            self.lift @ self.down.weight,
        )

    def plain(self) -> PlainFFN:
        """The SwiGLU that is equal."""
        return PlainFFN(*self.fused_weights())


class VFTProvider(FeedForwardProvider):
    """``ffn:vft``; settings as :class:`VFTSettings`."""

    name = "vft"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.settings = read_settings(VFTSettings, config, "model.vft")

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0) -> nn.Module:
        return VFT(d_model, d_ff, self.settings, dropout=dropout)

    def flops(self, d_model: int, d_ff: int, seq_len: int) -> int:
        return (4 * d_model + 6 * d_ff) * self.settings.rank_of(d_model) * seq_len
