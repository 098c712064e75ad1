"""Weights are cast once for all forwards that share them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from apt_core.data.batches import Batch
from apt_core.evaluation.quick_eval import score_batches
from apt_core.modeling import KeptCasts, cast_weight
from apt_core.modeling.compilation import Compilation
from apt_core.training.step.forward import Forward
from apt_core.types import ModelOutput

BF16 = torch.bfloat16


class Casting(nn.Module):
    """A layer that casts its weight itself, and notes what it got."""

    cast_once = ("weight",)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
        self.got = []

    def forward(self, x):
        self.got.append(cast_weight(self.weight, BF16))
        return x.to(BF16) @ self.got[-1]

    def casts(self):
        """How many different ones there were."""
        return len({id(cast) for cast in self.got})


@pytest.fixture
def layer():
    return Casting()


def forwards(layer, casts, dtype=BF16, number=3):
    for index in range(number):
        with casts.used(dtype):
            layer(torch.full((2, 3), 1.0 + index)).float().square().sum().backward()


def test_forwards_share_a_cast_and_gradients_are_the_same(layer):
    alone = copy.deepcopy(layer)
    forwards(layer, KeptCasts(layer))
    forwards(alone, KeptCasts(nn.Identity()))
    assert (layer.casts(), alone.casts()) == (1, 3)
    assert layer.weight.grad.dtype == torch.float32
    assert torch.equal(layer.weight.grad, alone.weight.grad)


@torch.no_grad()
def write(weight):
    weight.add_(1.0)


@pytest.mark.parametrize(
    "change",
    [
        write,
        lambda weight: write(weight.detach()),
        lambda weight: setattr(weight, "data", weight.data + 1.0),
        lambda weight: weight.requires_grad_(False),
    ],
    ids=["in place", "in place without a graph", "other memory", "frozen"],
)
def test_a_weight_that_changed_is_cast_again(layer, change):
    casts = KeptCasts(layer)
    forwards(layer, casts, number=1)
    change(layer.weight)
    with casts.used(BF16):
        layer(torch.ones(1, 3))
    before, after = layer.got
    assert after is not before and torch.equal(after, layer.weight.to(BF16))
    assert after.requires_grad is layer.weight.requires_grad


def test_a_replaced_weight_is_cast_again(layer):
    casts = KeptCasts(layer)
    forwards(layer, casts, number=1)
    layer.weight = nn.Parameter(layer.weight.detach() + 1.0)
    forwards(layer, casts, number=1)
    assert torch.equal(layer.got[1], layer.weight.to(BF16))


def test_nothing_is_left_of_a_cast_and_others_do_not_see_it(layer):
    casts, other = KeptCasts(layer), torch.zeros(3, 3)
    with casts.used(BF16):
        assert layer.weight.kept_cast is casts._kept[0][2]
        twin = copy.deepcopy(layer)
        functional = torch.func.functional_call(layer, {"weight": other}, (torch.ones(1, 3),))
        assert functional.abs().max() == 0
        assert cast_weight(layer.weight, torch.float16).dtype == torch.float16
    assert not hasattr(layer.weight, "kept_cast") and not hasattr(twin.weight, "kept_cast")
    casts.forget()
    assert not casts._kept
    with casts.used(None):
        assert not hasattr(layer.weight, "kept_cast")


class Scored(Casting):
    """A model with such a layer."""

    def forward(self, ids):
        hidden = super().forward(torch.ones(*ids.shape, 3))
        return ModelOutput(hidden.float(), hidden)


def test_batches_of_an_evaluation_share_a_cast():
    model, ids = Scored(), torch.zeros(1, 2, dtype=torch.int64)
    batches = [Batch(ids, ids, 2)] * 3
    forward = Forward(model, Compilation(None, "not compiled"))
    score_batches(model, batches, forward.sums, device=torch.device("cpu"), dtype=BF16)
    assert (model.casts(), len(model.got)) == (1, 3)
