"""Experts in plain form, and what of them has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from apt_core.modeling.plain import beyond_plain, drop_beyond, plain_of
from apt_core.providers import PlainExperts
from apt_plugins.moe.layer import MoELayer

Make = Callable[..., MoELayer]


def test_the_temperature_is_part_of_the_router(make_layer: Make, tokens: torch.Tensor) -> None:
    layer = make_layer(experts=5, top_k=3).eval()
    layer.router.temperature.fill_(0.5)
    form = plain_of(layer, PlainExperts)
    x = tokens.detach().flatten(0, 1)
    shares, chosen = (x @ form.router.weight.T).softmax(-1).topk(form.router.experts_per_token)
    shares = shares / shares.sum(-1, keepdim=True)
    gate, up = (torch.einsum("nd,efd->nef", x, each) for each in (form.gate, form.up))
    every = torch.einsum("nef,edf->ned", torch.nn.functional.silu(gate) * up, form.down)
    picked = every.gather(1, chosen[..., None].expand(-1, -1, every.shape[-1]))
    expected = (shares[..., None] * picked).sum(1)
    torch.testing.assert_close(layer(tokens.detach()).flatten(0, 1), expected)


def test_shared_experts_and_a_balancing_bias_can_be_dropped(make_layer: Make) -> None:
    layer = make_layer(shared=True)
    assert [each.name for _, each in beyond_plain(layer)] == ["shared_experts"]
    layer.router.bias.add_(torch.arange(4))
    assert drop_beyond(layer, ["shared_experts", "balancing_bias"]) == {
        "shared_experts": 1,
        "balancing_bias": 1,
    }
    assert layer.shared is None and not layer.router.bias.any() and not beyond_plain(layer)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"groups": 2}, "cut into 2 groups"),
        ({"activation": "gelu"}, "are gelu, not SwiGLU"),
        ({"scores": "sigmoid"}, "sigmoid scores, not softmax"),
    ],
)
def test_other_experts_have_no_plain_form(
    make_layer: Make, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        plain_of(make_layer(**settings), PlainExperts)
