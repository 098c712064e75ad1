"""Layers of experts, and the loop over tokens and slots that they are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.layers import GELU, SquaredReLU, SwiGLU
from apt_plugins.moe.experts import Experts
from apt_plugins.moe.layer import MoELayer
from apt_plugins.moe.router import TopKRouter

WIDTH = 8
DENSE = {"swiglu": SwiGLU, "gelu": GELU, "relu2": SquaredReLU}


@pytest.fixture
def make_layer() -> Callable[..., MoELayer]:
    """``make_layer(experts, top_k, groups=…, hidden=…, shared=True, capacity=…)``, in fp64, with
    weights large enough that every part tells."""

    def make(
        experts: int = 4,
        top_k: int = 2,
        *,
        groups: int = 1,
        hidden: int = 6,
        activation: str = "swiglu",
        scores: str = "softmax",
        shared: bool = False,
        **settings: Any,
    ) -> MoELayer:
        layer = MoELayer(
            TopKRouter(WIDTH, experts, top_k, groups=groups, scores=scores),
            Experts(experts * groups, WIDTH, hidden, activation),
            top_k=top_k,
            granularity=groups,
            shared=DENSE[activation](WIDTH, hidden) if shared else None,
            **settings,
        ).double()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(generator=generator).mul_(0.7)
        return layer

    return make


@pytest.fixture
def tokens() -> Tensor:
    """[2, 11, WIDTH] in fp64."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(2, 11, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def by_token() -> Callable[[MoELayer, Tensor], tuple[Tensor, list[list[bool]]]]:
    """What a layer gives by its definition, and which assignments it keeps: token by token and slot
    by slot, by indexing alone. ``renormalise=False`` leaves the weights of the kept as they were.
    """
    return _by_token


def _by_token(
    layer: MoELayer, x: Tensor, *, renormalise: bool = True
) -> tuple[Tensor, list[list[bool]]]:
    rows, top_k, experts = x.reshape(-1, x.shape[-1]), layer.top_k, layer.num_experts
    taken = [0] * (experts * layer.granularity)
    limit = math.inf
    if layer.capacity is not None and layer.training:
        limit = math.ceil(layer.capacity * len(rows) * top_k / experts)
    outputs, kept_rows = [], []
    for row in rows:
        y, kept_row = torch.zeros_like(row), []
        for group in range(layer.granularity):
            first = group * experts
            logits = layer.router.weight[first : first + experts] @ row
            scores = logits.softmax(0) if layer.router.scores == "softmax" else logits.sigmoid()
            chosen = scores.argsort(descending=True)[:top_k].tolist()
            kept = []
            for expert in chosen:
                kept.append(taken[first + expert] < limit)
                taken[first + expert] += kept[-1]
            kept_row += kept
            counted = [
                expert for expert, k in zip(chosen, kept, strict=True) if k or not renormalise
            ]
            total = sum(scores[expert] for expert in counted)
            for expert, k in zip(chosen, kept, strict=True):
                if k:
                    weight = scores[expert] / (total.detach() if top_k == 1 else total)
                    y = y + weight * _expert(layer.experts, first + expert, row)
        outputs.append(y)
        kept_rows.append(kept_row)
    routed = torch.stack(outputs).view_as(x)
    if layer.shared is None:
        return routed, kept_rows
    other, share = _shared(layer.shared, x), layer.shared_weight
    return routed + other if share is None else (1 - share) * routed + share * other, kept_rows


def _expert(experts: Experts, index: int, row: Tensor) -> Tensor:
    gate = experts.gate[index] @ row if experts.activation == "swiglu" else None
    return experts.down[index] @ _hidden(experts.activation, gate, experts.up[index] @ row)


def _shared(dense: nn.Module, x: Tensor) -> Tensor:
    activation = next(name for name, kind in DENSE.items() if type(dense) is kind)
    gate = x @ dense.gate.weight.T if activation == "swiglu" else None
    return _hidden(activation, gate, x @ dense.up.weight.T) @ dense.down.weight.T


def _hidden(activation: str, gate: Tensor | None, up: Tensor) -> Tensor:
    if activation == "swiglu":
        return F.silu(gate) * up
    return F.gelu(up) if activation == "gelu" else F.relu(up) ** 2
