"""Norms against plain loops in Python."""

from __future__ import annotations

import math
from pkgutil import resolve_name

import pytest
import torch

from apt_core.defaults import core_providers

FACTORIES = {spec.name: spec.factory for spec in core_providers("") if spec.kind == "norm"}
NAMES = list(FACTORIES)


def layer_of(name, d_model, settings=None):
    return resolve_name(FACTORIES[name])(settings).create_layer(d_model)


def rmsnorm(token, eps, weight):
    size = math.sqrt(sum(v * v for v in token) / len(token) + eps)
    return [w * v / size for v, w in zip(token, weight, strict=True)]


def layernorm(token, eps, weight, bias):
    mean = sum(token) / len(token)
    size = math.sqrt(sum((v - mean) ** 2 for v in token) / len(token) + eps)
    return [w * (v - mean) / size + b for v, w, b in zip(token, weight, bias, strict=True)]


FORMULAS = {"rmsnorm": rmsnorm, "layernorm": layernorm}


@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("settings", [None, {"eps": 0.5}])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_its_formula_token_by_token(name, settings, scale):
    layer = layer_of(name, 6, settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    parameters = [parameter.tolist() for parameter in layer.parameters()]
    eps = 1e-8 if settings is None else settings["eps"]
    x = scale * torch.randn(2, 3, 6, dtype=torch.float64)
    expected = [[FORMULAS[name](t, eps, *parameters) for t in tokens] for tokens in x.tolist()]
    torch.testing.assert_close(
        layer(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_that_starts_small_comes_out_at_one(name):
    x = 0.04 * 768**-0.5 * torch.randn(2, 3, 768)
    y = layer_of(name, 768)(x)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(2, 3), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_in_a_narrower_type_than_the_input_are_rounded_and_nothing_else(name):
    wide, narrow, x = layer_of(name, 6), layer_of(name, 6).bfloat16(), torch.randn(4, 6)
    with torch.no_grad():
        for parameter in narrow.parameters():
            parameter.uniform_(0.5, 1.5)
    wide.load_state_dict(narrow.state_dict())
    found = narrow(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wide(x), rtol=0, atol=0)
    found.sum().backward()
    assert {parameter.grad.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert narrow(x.bfloat16()).dtype == torch.bfloat16
