"""A feed-forward of two products with x · sigmoid(βx) between them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling import write_std
from apt_core.providers import FeedForwardProvider


class Layer(nn.Module):
    """Maps [B, T, D] to [B, T, D], every token for itself."""

    reads_stream = ("up.weight",)
    writes_stream = ("down.weight",)

    def __init__(self, d_model: int, d_ff: int, dropout: float, sharpness: float) -> None:
        super().__init__()
        self.dropout, self.sharpness = dropout, sharpness
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator, *, num_layers: int
    ) -> bool:
        if name != "down.weight":
            return False
        std = write_std(self.down.in_features, num_layers)
        nn.init.normal_(tensor, 0.0, std, generator=generator)
        return True

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden = hidden * torch.sigmoid(self.sharpness * hidden)
        return self.down(F.dropout(hidden, self.dropout, self.training))


class Provider(FeedForwardProvider):
    """``ffn:my_plugin``."""

    name = "my_plugin"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.sharpness = 1.0 if config is None else config.sharpness

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0) -> nn.Module:
        return Layer(d_model, d_ff, dropout, self.sharpness)

    def flops(self, d_model: int, d_ff: int, seq_len: int) -> int:
        return 4 * d_model * d_ff * seq_len  # two products; a multiply-add counts as two
