"""Experts whose weights are kept as integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apt_core.modeling.layers import GELU, SquaredReLU, SwiGLU
from apt_core.modeling.row_decoding import Function, Products
from apt_plugins.moe.experts import Computed

ACTIVATED: dict[str, Function] = {
    "swiglu": SwiGLU.activated,
    "gelu": GELU.activated,
    "relu2": SquaredReLU.activated,
}


def decoding_of_stored(self: Any, products: Products) -> Computed:
    """:meth:`apt_plugins.moe.experts.Experts.decoding` by what is kept of each expert: only those
    that were chosen are computed, one after the other."""
    if products.dtype is not None or self.up_codes.device.type != "cpu":
        return self
    names = ("gate", "up", "down") if self.activation == "swiglu" else ("up", "down")
    functions = [
        _expert(self.activation, [products.of(weight) for weight in weights])
        for weights in zip(*(experts_of(self, name) for name in names), strict=True)
    ]

    def computed(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in sorted({*indices.flatten().tolist()}):
            tokens, places = (indices == expert).nonzero(as_tuple=True)
            found = functions[expert](x[tokens])
            y.index_add_(0, tokens, found * weights[tokens, places][:, None])
        return y

    return computed


def experts_of(experts: nn.Module, name: str) -> list[Tensor]:
    """The weights called ``name`` of each expert, which know what they were made of."""
    stored = getattr(experts, name).stored
    return [each.values() for each in stored.unbound()]


def _expert(activation: str, products: list[Function]) -> Function:
    *gate, up, down = products
    activated = ACTIVATED[activation]
    if gate:
        return lambda x: down(activated(gate[0](x)) * up(x))
    return lambda x: down(activated(up(x)))
