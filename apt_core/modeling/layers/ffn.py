"""Feed-forward layers: ``ffn:default`` is SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.init import normal_, reset_layer, write_std
from apt_core.providers.ffn import FeedForwardProvider


class SwiGLU(nn.Module):
    """y = (silu(x Gᵀ) * (x Uᵀ)) Dᵀ (Shazeer 2020), without biases.

    G is ``gate.weight``, U ``up.weight`` [F, D], D ``down.weight`` [D, F]. One product for G and U
    together was slower on CPUs: its backward has to concatenate two gradients.
    """

    reads_stream = ("gate.weight", "up.weight")

    def __init__(self, d_model: int, d_ff: int, dropout: float = 0.0) -> None:
        super().__init__()
        if d_model < 1 or d_ff < 1:
            raise ValueError(
                f"model.d_model and model.d_ff must be positive, not {d_model}, {d_ff}"
            )
        self.d_model, self.d_ff, self.dropout = d_model, d_ff, dropout
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)
        reset_layer(self)

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator | None, *, num_layers: int
    ) -> bool:
        if name in ("gate.weight", "up.weight"):
            normal_(tensor, self.d_model**-0.5, generator)
        elif name == "down.weight":
            normal_(tensor, write_std(self.d_ff, num_layers), generator)
        else:
            return False
        return True

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] to [B, T, D]; tokens do not mix."""
        hidden = F.silu(self.gate(x)) * self.up(x)
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout, self.training)
        return self.down(hidden)


class SwiGLUProvider(FeedForwardProvider):
    """``ffn:default``; it has no settings."""

    name = "default"

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0) -> nn.Module:
        return SwiGLU(d_model, d_ff, dropout)
