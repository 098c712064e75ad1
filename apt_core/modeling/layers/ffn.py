"""Feed-forward layers: ``ffn:default`` (SwiGLU), ``ffn:gelu`` and ``ffn:relu2``.

Shapes: B batch, T tokens, D d_model, F d_ff.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.growth import Larger, Sizes, resize_linear
from apt_core.modeling.init import normal_, reset_layer, write_std
from apt_core.modeling.row_decoding import Function, Products
from apt_core.providers.ffn import FeedForwardProvider
from apt_core.providers.plain import PlainFFN


class FeedForward(nn.Module, ABC):
    """y = h(x) Dᵀ without biases, dropout on the hidden units h; tokens do not mix.

    With a subclass's :meth:`activated` f: h = f(x Uᵀ), or f(x Gᵀ) * (x Uᵀ) if it is ``gated``. U is
    ``up.weight`` [F, D], G ``gate.weight`` [F, D], D ``down.weight`` [D, F].
    """

    gated: ClassVar[bool] = False
    reads_stream: ClassVar[tuple[str, ...]] = ("up.weight",)
    writes_stream: ClassVar[tuple[str, ...]] = ("down.weight",)

    def __init__(self, d_model: int, d_ff: int, dropout: float = 0.0) -> None:
        super().__init__()
        if d_model < 1 or d_ff < 1:
            raise ValueError(
                f"model.d_model and model.d_ff must be positive, not {d_model}, {d_ff}"
            )
        self.d_model, self.d_ff, self.dropout = d_model, d_ff, dropout
        if self.gated:
            self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)
        reset_layer(self)

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator | None, *, num_layers: int
    ) -> bool:
        if name in self.reads_stream:
            normal_(tensor, self.d_model**-0.5, generator)
        elif name == "down.weight":
            normal_(tensor, write_std(self.d_ff, num_layers), generator)
        else:
            return False
        return True

    @staticmethod
    @abstractmethod
    def activated(x: Tensor) -> Tensor:
        """What the units [..., F] make of their inputs, one by one."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] to [B, T, D]."""
        if self.gated:
            hidden = self.activated(self.gate(x)) * self.up(x)
        else:
            hidden = self.activated(self.up(x))
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout, self.training)
        return self.down(hidden)

    def grow(self, sizes: Sizes) -> dict[str, Larger]:
        """Take on larger ``sizes``: new units compute, and are not read at first."""
        self.d_model, self.d_ff = sizes.d_model or self.d_model, sizes.d_ff or self.d_ff
        readers = ("gate", "up") if self.gated else ("up",)
        for name in readers:
            resize_linear(getattr(self, name), self.d_ff, self.d_model)
        resize_linear(self.down, self.d_model, self.d_ff)
        return {
            "down.weight": Larger({0: "zero", 1: "zero"}),
            **{f"{name}.weight": Larger({0: "initial", 1: "initial"}) for name in readers},
        }

    def decoding(self, products: Products) -> Function:
        """The layer as a function of x [N, D], for many calls with the same weights."""
        down, activated = products.of(self.down.weight), self.activated
        if not self.gated:
            up = products.of(self.up.weight)
            return lambda x: down(activated(up(x)))
        gate_and_up = products.pair(self.gate.weight, self.up.weight)

        def computed(x: Tensor) -> Tensor:
            gate, up = gate_and_up(x)
            return down(activated(gate) * up)

        return computed


class SwiGLU(FeedForward):
    """y = (silu(x Gᵀ) * (x Uᵀ)) Dᵀ (Shazeer 2020), without biases.

    G is ``gate.weight``, U ``up.weight`` [F, D], D ``down.weight`` [D, F]. One product for G and U
    together was slower on CPUs: its backward has to concatenate two gradients.
    """

    gated = True
    reads_stream = ("gate.weight", "up.weight")

    @staticmethod
    def activated(x: Tensor) -> Tensor:
        return F.silu(x)

    def plain(self) -> PlainFFN:
        """The layer itself."""
        return PlainFFN(self.gate.weight, self.up.weight, self.down.weight)


class GELU(FeedForward):
    """y = gelu(x Uᵀ) Dᵀ (Hendrycks and Gimpel 2016), without biases.

    gelu(a) = a Φ(a) with the normal distribution's own Φ, not its approximation by tanh, which is
    up to 5e-4 off and slower on CPUs.
    """

    @staticmethod
    def activated(x: Tensor) -> Tensor:
        return F.gelu(x)


class SquaredReLU(FeedForward):
    """y = max(x Uᵀ, 0)² Dᵀ (So et al. 2021, Primer), without biases."""

    @staticmethod
    def activated(x: Tensor) -> Tensor:
        positive = F.relu(x)
        # The backward of square() takes a power: a product is faster on CPUs.
        return positive * positive


class SwiGLUProvider(FeedForwardProvider):
    """``ffn:default``; it has no settings."""

    name = "default"

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0) -> nn.Module:
        return SwiGLU(d_model, d_ff, dropout)


class GELUProvider(FeedForwardProvider):
    """``ffn:gelu``; it has no settings."""

    name = "gelu"

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0) -> nn.Module:
        return GELU(d_model, d_ff, dropout)

    def flops(self, d_model: int, d_ff: int, seq_len: int) -> int:
        return 4 * d_model * d_ff * seq_len


class SquaredReLUProvider(FeedForwardProvider):
    """``ffn:relu2``; it has no settings."""

    name = "relu2"

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0) -> nn.Module:
        return SquaredReLU(d_model, d_ff, dropout)

    def flops(self, d_model: int, d_ff: int, seq_len: int) -> int:
        return 4 * d_model * d_ff * seq_len
