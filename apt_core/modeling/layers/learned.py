"""Learned absolute positions (``position:learned``)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.growth import Larger, Sizes, resized
from apt_core.modeling.init import embedding_std, normal_, reset_layer
from apt_core.providers.position import PositionProvider


class LearnedPosition(nn.Module):
    """One learned vector a position, ``weight`` [max_seq_len, D], to add to token embeddings."""

    def __init__(self, d_model: int, max_seq_len: int) -> None:
        super().__init__()
        if d_model < 1 or max_seq_len < 1:
            raise ValueError(
                "model.d_model and model.max_seq_len must be positive, not "
                f"{d_model}, {max_seq_len}"
            )
        self.d_model, self.max_seq_len = d_model, max_seq_len
        self.weight = nn.Parameter(torch.empty(max_seq_len, d_model))
        reset_layer(self)

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator | None, *, num_layers: int
    ) -> bool:
        if name != "weight":
            return False
        normal_(tensor, embedding_std(self.d_model), generator)
        return True

    def grow(self, sizes: Sizes) -> dict[str, Larger]:
        """Take on a larger ``sizes.d_model``."""
        self.d_model = sizes.d_model or self.d_model
        self.weight = resized(self.weight, self.max_seq_len, self.d_model)
        return {"weight": Larger({1: "zero"})}

    def forward(self, positions: Tensor) -> Tensor:
        """positions int64 [T] or [B, T] to [..., D].

        Every position must be below ``max_seq_len``. This is not checked, since it would read the
        tensor on the host; the backbone refuses sequences that are too long.
        """
        return F.embedding(positions, self.weight)


class LearnedPositionProvider(PositionProvider):
    """``position:learned``; it has no settings. Nothing is turned: attention gets no rotary."""

    name = "learned"

    def create_embedding(self, d_model: int, max_seq_len: int) -> nn.Module:
        return LearnedPosition(d_model, max_seq_len)
