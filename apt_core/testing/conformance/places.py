"""Positions for tests, which make the output depend on each absolute position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apt_core.providers.position import PositionProvider


class Marked(nn.Module):
    """Scales each channel of x [B, T, H, R] by a factor of its place, by default 0..T-1.

    Attention with rotary embedding does not change if all positions are shifted; with this it does,
    so that a missing offset is noticed.
    """

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        places = positions.float()[..., None, None]
        channels = torch.arange(1, x.shape[-1] + 1, device=x.device)
        return x * (1 + 0.5 * torch.sin(0.37 * places * channels + channels)).to(x.dtype)


class MarkedEmbedding(nn.Module):
    """A fixed vector a position, int64 [T] or [B, T] to [..., D]."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def forward(self, positions: Tensor) -> Tensor:
        channels = torch.arange(1, self.d_model + 1, device=positions.device)
        return torch.sin(0.37 * positions.float()[..., None] * channels + channels)


class MarkedPlaces(PositionProvider):
    """Positions for attention, by :class:`Marked`."""

    name = "marked"

    def create_rotary(self, head_dim: int, max_seq_len: int) -> nn.Module:
        return Marked()
