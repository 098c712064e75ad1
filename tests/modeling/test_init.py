from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn

from apt_core.modeling import ModelBuilder, initialize_parameters
from apt_core.providers.ffn import FeedForwardProvider
from apt_core.types import ProviderSpec


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_building_draws_from_no_global_generator(shelf, tiny):
    before = states()
    ModelBuilder(tiny, shelf).build_model()
    assert states() == before


def test_weights_are_a_function_of_the_seed_alone(shelf, tiny):
    first = weights(ModelBuilder(tiny, shelf).build_model())
    torch.manual_seed(123)
    torch.randn(5)
    assert same(weights(ModelBuilder(tiny, shelf).build_model()), first)
    other = weights(ModelBuilder(tiny, shelf, seed=8).build_model())
    assert not torch.equal(other["embedding.weight"], first["embedding.weight"])


def test_a_parameter_more_changes_no_other(shelf, tiny):
    with_compensator = weights(ModelBuilder(tiny, shelf).build_model())
    tiny["model"]["tva"]["s"] = 0
    without = weights(ModelBuilder(tiny, shelf).build_model())
    assert len(without) < len(with_compensator)
    assert same(without, {name: with_compensator[name] for name in without})


def test_a_block_alone_is_that_of_the_model(shelf, tiny):
    builder = ModelBuilder(tiny, shelf)
    model = weights(builder.build_model())
    block = {f"blocks.1.{name}": w for name, w in weights(builder.build_block(1)).items()}
    assert block and {name: w.shape for name, w in block.items()} == {
        name: w.shape for name, w in model.items() if name.startswith("blocks.1.")
    }


class DrawsInItsConstructor(nn.Module):
    """As third-party layers do: raw parameters and no rule."""

    def __init__(self, d_model):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_model, d_model) * random.random())
        self.shift = nn.Parameter(torch.from_numpy(np.random.rand(d_model)).float())

    def forward(self, x):
        return x @ self.weight + self.shift


class DrawingProvider(FeedForwardProvider):
    def create_layer(self, d_model, d_ff, dropout=0.0):
        return DrawsInItsConstructor(d_model)


def test_a_constructor_that_draws_is_contained(shelf, tiny):
    shelf.add(ProviderSpec("ffn", "drawing", DrawingProvider))
    tiny["model"]["ffn_name"] = "drawing"
    before = states()
    first = weights(ModelBuilder(tiny, shelf).build_model())
    assert states() == before
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    assert same(weights(ModelBuilder(tiny, shelf).build_model()), first)
    assert not torch.equal(first["blocks.0.ffn.weight"], first["blocks.1.ffn.weight"])


class Parts(nn.Module):
    def __init__(self, more):
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 2)
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.more = nn.Conv1d(3, 4, 2) if more else None


def test_torchs_own_modules_are_initialised_by_name_too():
    before = states()
    small, large = Parts(False), Parts(True)
    after_construction = states()
    initialize_parameters(small, seed=3)
    initialize_parameters(large, seed=3)
    assert states() == after_construction != before
    shared = {name: large.state_dict()[name] for name in small.state_dict()}
    assert same(weights(small), shared)
    assert large.conv.weight.abs().max() > 0
    assert not torch.equal(large.conv.weight, large.more.weight)


class OwnRule(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.empty(2))

    def init_parameter(self, name, tensor, generator, *, num_layers):
        if name != "scale":
            return False
        tensor.fill_(num_layers)
        return True


def test_a_layers_own_rule_comes_first_and_may_decline():
    layer = OwnRule()
    initialize_parameters(layer, seed=0, num_layers=5)
    assert layer.scale.tolist() == [5, 5]
    assert layer.inner.bias.abs().max() == 0
    assert layer.inner.weight.std() > 0
