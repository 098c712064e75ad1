"""Multi-head attention whose scores are divided by a temperature that each head learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apt_core.modeling.layers import MHAProvider, MultiHeadAttention


class HeadTemperature(MultiHeadAttention):
    """Multi-head attention, with its cache, masks and checks; a temperature for each of the H heads
    divides the queries [B, H, T, R]."""

    def __init__(self, d_model: int, num_heads: int, initial: float, **options: Any) -> None:
        super().__init__(d_model, num_heads, **options)
        self.initial = initial
        self.temperature = nn.Parameter(torch.full((num_heads,), initial))

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator, *, num_layers: int
    ) -> bool:
        if name == "temperature":
            nn.init.constant_(tensor, self.initial)
            return True
        return super().init_parameter(name, tensor, generator, num_layers=num_layers)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return super().attend(q / self.temperature[:, None, None].to(q.dtype), k, v, mask)


class Provider(MHAProvider):
    """``attention:my_plugin``: supports, caches and costs what multi-head attention does."""

    name = "my_plugin"

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.initial = 1.0 if config is None else config.initial

    def create_layer(self, d_model: int, num_heads: int, **options: Any) -> nn.Module:
        return HeadTemperature(d_model, num_heads, self.initial, **options)
