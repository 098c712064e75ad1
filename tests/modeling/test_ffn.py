"""Feed-forwards against plain loops in Python."""

from __future__ import annotations

import math
from pkgutil import resolve_name

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from apt_core.defaults import core_providers
from apt_core.modeling import initialize_parameters
from apt_core.modeling.lr_scale import learning_rate_scales

FACTORIES = {spec.name: spec.factory for spec in core_providers("") if spec.kind == "ffn"}
NAMES = list(FACTORIES)


def provider_of(name):
    return resolve_name(FACTORIES[name])()


def layer_of(name, d_model=6, d_ff=10, dropout=0.0):
    torch.manual_seed(0)
    layer = provider_of(name).create_layer(d_model, d_ff, dropout).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def product(matrix, vector):
    return [sum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix]


def swiglu(gate, up, down, token):
    gates = [g / (1 + math.exp(-g)) for g in product(gate, token)]
    return product(down, [g * u for g, u in zip(gates, product(up, token), strict=True)])


def gelu(up, down, token):
    hidden = [h / 2 * (1 + math.erf(h / math.sqrt(2))) for h in product(up, token)]
    return product(down, hidden)


def relu2(up, down, token):
    return product(down, [h * h if h > 0 else 0.0 for h in product(up, token)])


def vft(compress, gate, up, down, lift, token):
    return product(lift, swiglu(gate, up, down, product(compress, token)))


FORMULAS = {
    "default": (swiglu, ("gate.weight", "up.weight", "down.weight")),
    "gelu": (gelu, ("up.weight", "down.weight")),
    "relu2": (relu2, ("up.weight", "down.weight")),
    "vft": (vft, ("compress", "gate.weight", "up.weight", "down.weight", "lift")),
}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_its_formula_token_by_token(name):
    layer = layer_of(name)
    formula, parameters = FORMULAS[name]
    matrices = [layer.get_parameter(parameter).tolist() for parameter in parameters]
    assert len(matrices) == len(list(layer.parameters()))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = [[formula(*matrices, token) for token in sequence] for sequence in x.tolist()]
    torch.testing.assert_close(
        layer(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_dropout_takes_hidden_units_in_training_alone(name):
    layer = layer_of(name, dropout=0.5)
    seen = []
    layer.down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(4, 8, 6, dtype=torch.float64) + 3
    layer.eval()(x)
    layer.train()(x)
    whole, thinned = seen
    alive = whole != 0
    kept = (thinned != 0)[alive]
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(thinned[alive][kept], 2 * whole[alive][kept])
    assert torch.equal(layer.eval()(x), layer_of(name)(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [(64, 256, 7), (24, 10, 1)])
def test_flops_are_those_of_its_products(name, sizes):
    d_model, d_ff, length = sizes
    provider = provider_of(name)
    with torch.device("meta"):
        layer = provider.create_layer(d_model, d_ff)
        x = torch.empty(1, length, d_model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert provider.flops(d_model, d_ff, length) == counter.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_its_output_starts_of_the_order_of_the_defaults(name):
    x = torch.randn(4, 64, 128, generator=torch.Generator().manual_seed(1))
    sizes = []
    for provider in (name, "default"):
        layer = provider_of(provider).create_layer(128, 512)
        initialize_parameters(layer, seed=0, num_layers=6)
        sizes.append(layer(x).square().mean().sqrt().item())
    assert 0.4 < sizes[0] / sizes[1] < 2.5


@pytest.mark.parametrize("name", NAMES)
def test_what_reads_the_stream_learns_at_the_streams_rate(name):
    model = torch.nn.ModuleDict({"ffn": provider_of(name).create_layer(64, 256)})
    parameters = dict(model.named_parameters())
    scales = learning_rate_scales(model, 64)
    readers = {n for n, p in parameters.items() if p.shape[-1] == 64 and n != "ffn.lift"}
    assert readers
    assert readers <= set(scales) <= set(parameters)
    assert not {"ffn.down.weight", "ffn.lift"} & set(scales)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [(8, 0), (8, -1)])
def test_a_hidden_width_that_cannot_be_built_names_the_setting(name, sizes):
    with pytest.raises(ValueError, match=r"model\.d_ff"):
        provider_of(name).create_layer(*sizes)
