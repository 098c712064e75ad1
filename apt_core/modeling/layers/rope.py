"""Rotary position embedding (RoFormer, Su et al. 2021): ``position:rope``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apt_core.providers.position import PositionProvider


class Rotary(nn.Module):
    """Turns pairs (i, i + R/2) of a width R by angles position * theta^(-2i/R).

    The halves are paired as in Llama, so weights move between the two without permutation.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_seq_len: int, theta: float = 10_000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(
                f"RoPE turns pairs, and the head width {head_dim} is odd: choose an even width "
                "(model.d_model / model.num_heads, or model.tva.r or .rank), or another "
                "model.position_name"
            )
        if theta <= 1:
            raise ValueError(
                f"model.rope.theta: the base of the frequencies must be more than 1, not {theta}"
            )
        self.head_dim, self.max_seq_len, self.theta = head_dim, max_seq_len, theta
        self.register_buffer("cos", torch.empty(max_seq_len, 1, head_dim), persistent=False)
        self.register_buffer("sin", torch.empty(max_seq_len, 1, head_dim), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Compute the tables; the sine's first half is negated, so that a swap of halves turns."""
        if self.cos.is_meta:
            return
        half = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu")
        positions = torch.arange(self.max_seq_len, dtype=torch.float64, device="cpu")
        angles = positions[:, None] * self.theta ** (-half / self.head_dim)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        self.cos.copy_(torch.cat([cos, cos], dim=-1))
        self.sin.copy_(torch.cat([-sin, sin], dim=-1))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Turn x [B, T, H, R] by ``positions`` [T] or [B, T], by default 0..T-1.

        Raises ValueError for more than ``max_seq_len`` tokens.
        """
        length = x.shape[1]
        if length > self.max_seq_len:
            raise ValueError(
                f"a sequence of {length} tokens is longer than model.max_seq_len "
                f"{self.max_seq_len}: shorten it or raise the setting"
            )
        if positions is None:
            cos, sin = self.cos[:length], self.sin[:length]
        else:
            cos, sin = self.cos[positions], self.sin[positions]
        swapped = x.roll(self.head_dim // 2, dims=-1)
        return torch.addcmul(x * cos.to(x.dtype), swapped, sin.to(x.dtype))


class RoPEProvider(PositionProvider):
    """``position:rope``; setting ``theta``, the base of the frequencies (10000)."""

    name = "rope"

    def create_rotary(self, head_dim: int, max_seq_len: int) -> nn.Module:
        return Rotary(head_dim, max_seq_len, float(self.setting("theta", 10_000.0)))
