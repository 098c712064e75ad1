"""What every feed-forward, norm and position layer of the core does, whatever it computes."""

from __future__ import annotations

from pkgutil import resolve_name

import pytest
import torch
from torch import nn
from torch.func import functional_call

from apt_core.defaults import core_providers
from apt_core.modeling import ModelBuilder, initialize_parameters, probe_layer
from apt_core.modeling.layers import RoPEProvider, TVAProvider
from apt_core.providers import Provider

KINDS = ("ffn", "norm", "position")
FACTORIES = {
    (spec.kind, spec.name): spec.factory for spec in core_providers("") if spec.kind in KINDS
}
PROVIDERS = list(FACTORIES)

WIDTH, LENGTH = 8, 6


def provider_of(kind, name):
    return resolve_name(FACTORIES[kind, name])()


def build(kind, name, dropout=0.0):
    provider = provider_of(kind, name)
    if kind == "ffn":
        return provider.create_layer(WIDTH, 12, dropout)
    if kind == "norm":
        return provider.create_layer(WIDTH)
    return provider.create_rotary(WIDTH, LENGTH) or provider.create_embedding(WIDTH, LENGTH)


def layer_of(kind, name, dropout=0.0):
    """A layer whose parameters are all of the order of one."""
    layer = build(kind, name, dropout)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    return layer


def input_of(kind, name, dtype=torch.float32):
    if kind == "position":
        if provider_of(kind, name).create_embedding(WIDTH, LENGTH):
            return torch.tensor([[0, 1, 2, 5], [3, 4, 0, 1]])
        shape = (2, LENGTH, 3, WIDTH)
    else:
        shape = (2, LENGTH, WIDTH)
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "name"), PROVIDERS)
def test_every_gradient_is_that_of_finite_differences(kind, name):
    layer = layer_of(kind, name).double()
    x = input_of(kind, name, torch.float64)[:, :2]
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    arguments = [x.requires_grad_(x.is_floating_point()), *layer.parameters()]
    assert torch.autograd.gradcheck(call, arguments)


@pytest.mark.parametrize(("kind", "name"), PROVIDERS)
def test_autocast_to_bf16_stays_within_its_precision(kind, name):
    layer = layer_of(kind, name)
    x = input_of(kind, name)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x)
    error = (rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 2**-7


@pytest.mark.parametrize(("kind", "name"), PROVIDERS)
def test_memory_that_is_given_late_is_filled_alike(kind, name):
    with torch.device("meta"):
        late = build(kind, name)
    tensors = [*late.parameters(), *late.buffers()]
    assert tensors
    assert all(tensor.is_meta for tensor in tensors)
    late.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*late.parameters(), *late.buffers()]:
            tensor.fill_(float("nan"))
    direct = build(kind, name)
    for layer in (late, direct):
        initialize_parameters(layer, seed=3, num_layers=2)
    ours = dict(late.named_parameters()) | dict(late.named_buffers())
    theirs = dict(direct.named_parameters()) | dict(direct.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("kind", "name"), PROVIDERS)
def test_a_model_of_it_starts_near_guessing_and_learns_in_all_its_parameters(kind, name, shelf):
    sizes = {"d_model": 32, "num_heads": 4, "num_layers": 2, "d_ff": 64, "max_seq_len": 24}
    model = ModelBuilder({"model": {**sizes, f"{kind}_name": name}}, shelf).build_model()
    ids = torch.arange(96).view(4, 24)
    loss = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten() + 96)
    assert abs(loss.item() - 5.545) < 0.4
    loss.backward()
    assert [n for n, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, name in PROVIDERS if kind in ("ffn", "norm")]
)
@pytest.mark.parametrize("size", [0, -1])
def test_a_width_that_cannot_be_built_names_the_setting(kind, name, size):
    options = (4,) if kind == "ffn" else ()
    with pytest.raises(ValueError, match=r"model\.d_model"):
        provider_of(kind, name).create_layer(size, *options)


@pytest.mark.parametrize(
    ("kind", "provider"),
    [
        ("attention", TVAProvider()),
        *((kind, provider_of(kind, name)) for kind, name in PROVIDERS if kind != "position"),
    ],
)
def test_the_probe_passes_the_cores_layers_and_draws_nothing(kind, provider):
    before = torch.get_rng_state()
    position = RoPEProvider() if kind == "attention" else None
    assert probe_layer(provider, kind, position=position) is None
    assert torch.equal(torch.get_rng_state(), before)


class Broken(Provider):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def create_layer(self, d_model, d_ff, dropout=0.0):
        layer = torch.nn.Linear(d_model, d_model)
        layer.register_forward_hook(lambda module, inputs, output: self.change(output))
        return layer


def raises(_):
    raise RuntimeError("no kernel\nfor this device")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (raises, "RuntimeError: no kernel"),
        (lambda y: y[:, :1], "its layer maps (2, 8, 64) to (2, 1, 64)"),
        (lambda y: y * float("nan"), "its layer gives values that are not finite"),
        (lambda y: torch.zeros_like(y, requires_grad=True), "no gradient reaches the input"),
    ],
)
def test_the_probe_tells_why_in_one_line(change, reason):
    answer = probe_layer(Broken(change), "ffn")
    assert answer.startswith(reason)
    assert "\n" not in answer


class Takes(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.weight * x


class TakesNothingElse(Provider):
    def create_layer(self, d_model, num_heads, **options):
        return Takes()


def test_the_probe_calls_an_attention_as_a_block_does():
    answer = probe_layer(TakesNothingElse(), "attention")
    assert "unexpected keyword argument" in answer
