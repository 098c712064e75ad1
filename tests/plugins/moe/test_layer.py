from __future__ import annotations

import copy

import pytest
import torch

from apt_core.modeling import Tokens, initialize_parameters, padding_marked
from apt_core.modeling.layers import SwiGLU
from apt_core.modeling.lr_scale import learning_rate_scales
from apt_plugins.moe.layer import moe_layers

FORMS = {
    "swiglu": {},
    "gelu": {"activation": "gelu"},
    "relu2": {"activation": "relu2"},
    "sigmoid": {"scores": "sigmoid"},
    "granularity": {"groups": 2},
    "one expert a token": {"top_k": 1},
    "all experts": {"top_k": 4},
    "a single expert": {"experts": 1, "top_k": 1},
    "shared, added": {"shared": True},
    "shared, split": {"shared": True, "shared_weight": 0.3},
    "capacity": {"capacity": 0.7},
    "capacity, one expert a token": {"capacity": 0.7, "top_k": 1},
    "capacity, all of it": {
        "capacity": 0.6,
        "groups": 2,
        "shared": True,
        "shared_weight": 0.5,
    },
}


def differences(layer, x, expected, upstream):
    """The largest relative error of each gradient, and of the output, by name."""
    names = ["x", *(name for name, _ in layer.named_parameters())]
    wanted = (x, *layer.parameters())
    y = layer(x)
    pairs = zip(
        ("y", *names),
        (y, *torch.autograd.grad(y, wanted, upstream, allow_unused=True)),
        (expected, *torch.autograd.grad(expected, wanted, upstream, allow_unused=True)),
        strict=True,
    )
    return {
        name: 0.0
        if a is None and b is None
        else ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
        for name, a, b in pairs
        if a is None or b is None or a.abs().max() > 0 or b.abs().max() > 0
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_all_gradients_are_those_of_the_loop_over_tokens(
    form, dtype, tolerance, make_layer, by_token, tokens
):
    layer = make_layer(**FORMS[form])
    # Dropped where it rounds otherwise, an assignment would be another: both see the same weights.
    layer, x = layer.to(dtype), tokens.detach().to(dtype).requires_grad_()
    upstream = torch.randn(x.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    expected, kept = by_token(layer, x)
    errors = differences(layer, x, expected, upstream)
    assert max(errors.values()) < tolerance, errors
    assert {"y", "x", "experts.up", "experts.down"} <= errors.keys()
    if "capacity" in FORMS[form]:
        assert layer.kept.tolist() == kept
        assert not layer.kept.all()
    else:
        assert layer.kept is None and all(map(all, kept))


@pytest.mark.parametrize("capacity", [0.2, 0.5, 1.0, 1.25, 1.9])
def test_an_expert_takes_its_share_times_capacity_in_the_order_of_tokens(
    capacity, make_layer, by_token, tokens
):
    layer = make_layer(capacity=capacity, groups=2)
    y = layer(tokens)
    expected, kept = by_token(layer, tokens)
    assert layer.kept.tolist() == kept
    torch.testing.assert_close(y, expected)
    sent = layer.indices[layer.kept]
    limit = -(-capacity * tokens[..., 0].numel() * 2 // 4)
    assert torch.bincount(sent).max() <= limit


def test_a_later_token_keeps_no_earlier_one_from_an_expert(make_layer, tokens):
    layer = make_layer(capacity=0.8)
    first = layer(tokens[:1])
    kept = layer.kept
    assert not kept[5:].all()
    changed = torch.cat([tokens[:1, :5], tokens[1:, 5:]], 1)
    second = layer(changed)
    assert not torch.equal(layer.kept, kept)
    assert torch.equal(layer.kept[:5], kept[:5])
    torch.testing.assert_close(second[:, :5], first[:, :5], rtol=1e-12, atol=1e-12)


def test_nothing_is_dropped_in_evaluation(make_layer, by_token, tokens):
    layer = make_layer(capacity=0.2)
    layer(tokens)
    indices, kept = layer.indices, layer.kept
    dropless = copy.deepcopy(layer)
    dropless.capacity = None
    assert torch.equal(layer.eval()(tokens), dropless(tokens))
    assert layer.indices is indices and layer.kept is kept


def test_a_token_that_loses_all_its_experts_gets_the_shared_one_alone(make_layer, tokens):
    layer = make_layer(capacity=0.1, shared=True)
    y = layer(tokens)
    lost = ~layer.kept.any(1).view(tokens.shape[:2])
    assert lost.any()
    torch.testing.assert_close(y[lost], layer.shared(tokens)[lost])
    layer.shared = None
    assert layer(tokens)[lost].abs().max() == 0


@pytest.mark.parametrize("gap", [30.0, 100.0, 150.0])
def test_an_expert_that_is_left_with_hardly_any_weight_takes_it_all(make_layer, gap):
    """The first choice of every token but one is full."""
    layer = make_layer(experts=4, top_k=2, capacity=0.5).float()
    x = torch.ones(8, 8, requires_grad=True)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0] = 2 * gap / 8
        layer.router.weight[1] = gap / 8
    kept = torch.tensor([[False, True]]).expand(8, 2)
    layer._within = lambda indices, limit: kept
    y = layer(x[None])[0]
    alone = layer.experts(x, layer.indices[:, 1:], torch.ones(8, 1))
    torch.testing.assert_close(y, alone)
    gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)


def copies_of(dense, layer):
    """Make every expert of each group a copy of its part of the hidden units of ``dense``."""
    groups, experts = layer.granularity, layer.num_experts
    with torch.no_grad():
        for name in ("gate", "up"):
            parts = getattr(dense, name).weight.unflatten(0, (groups, -1))
            getattr(layer.experts, name).copy_(parts.repeat_interleave(experts, 0))
        parts = dense.down.weight.unflatten(1, (groups, -1)).movedim(1, 0)
        layer.experts.down.copy_(parts.repeat_interleave(experts, 0))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("capacity", [None, 1.0])
def test_while_experts_are_alike_they_give_what_one_gives(
    capacity, groups, top_k, temperature, make_layer, tokens
):
    layer = make_layer(top_k=top_k, groups=groups, capacity=capacity)
    layer.router.temperature.fill_(temperature)
    dense = SwiGLU(8, 6 * groups).double()
    copies_of(dense, layer)
    y, expected = layer(tokens).flatten(0, 1), dense(tokens).flatten(0, 1)
    whole = torch.ones(len(y), dtype=torch.bool)
    if capacity is not None and top_k < 4:
        kept = layer.kept.unflatten(1, (groups, top_k))
        assert not kept.all()
        whole = kept.any(2).all(1)
    assert whole.sum() > 4
    torch.testing.assert_close(y[whole], expected[whole], rtol=1e-12, atol=1e-14)


def test_without_renormalisation_an_overflow_would_change_the_output(make_layer, by_token, tokens):
    layer = make_layer(capacity=0.7)
    dense = SwiGLU(8, 6).double()
    copies_of(dense, layer)
    expected = dense(tokens)
    whole = torch.tensor(by_token(layer, tokens)[1]).any(1).view(tokens.shape[:2])
    right, wrong = (
        (by_token(layer, tokens, renormalise=renormalise)[0] - expected)[whole].abs().max()
        for renormalise in (True, False)
    )
    assert right < 1e-12 < 1e-4 < wrong


def test_one_token_at_a_time_gives_what_all_give_together(make_layer, tokens):
    layer = make_layer(groups=2, shared=True).eval()
    with torch.no_grad():
        together = layer(tokens)
        alone = torch.cat([layer(tokens[:, t : t + 1]) for t in range(tokens.shape[1])], 1)
    torch.testing.assert_close(alone, together)


def test_dropout_is_of_training_alone(make_layer, tokens):
    layer = make_layer(dropout=0.5)
    plain = make_layer()
    torch.manual_seed(0)
    first = layer(tokens)
    assert not torch.allclose(first, layer(tokens))
    assert not torch.allclose(first, plain(tokens))
    assert torch.equal(layer.eval()(tokens), plain(tokens))


@pytest.mark.parametrize("form", ["swiglu", "gelu", "granularity", "capacity, all of it"])
def test_it_compiles_in_one_graph(form, make_layer, tokens):
    layer = make_layer(**FORMS[form])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    wanted = (tokens, *layer.parameters())
    y, expected = compiled(tokens), layer(tokens)
    torch.testing.assert_close(y, expected)
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_it_can_be_copied_after_a_forward_in_training(make_layer, tokens):
    layer = make_layer(capacity=0.7)
    y = layer(tokens)
    other = copy.deepcopy(layer)
    assert other.indices is None and other.kept is None and other.router.logits is None
    assert torch.equal(other(tokens), y)
    assert set(layer.state_dict()) == {
        "router.weight",
        "router.bias",
        "router.temperature",
        "router.noise",
        "limits",
        "experts.gate",
        "experts.up",
        "experts.down",
    }


def test_a_new_layer_starts_as_dense_ones_do(make_layer):
    layer = make_layer(experts=16, hidden=64).float()
    initialize_parameters(layer, seed=1, num_layers=3)
    dense = SwiGLU(8, 64)
    initialize_parameters(dense, seed=2, num_layers=3)
    for name in ("gate", "up", "down"):
        one, other = getattr(layer.experts, name).std(), getattr(dense, name).weight.std()
        assert 0.8 < one / other < 1.25
    assert 0.015 < layer.router.weight.std() < 0.025


def test_what_reads_the_stream_learns_by_width(make_layer):
    scales = learning_rate_scales(make_layer(shared=True), 8)
    assert set(scales) == {
        "router.weight",
        "experts.gate",
        "experts.up",
        "shared.gate.weight",
        "shared.up.weight",
    }


def test_the_layers_of_a_model_are_found_in_order(make_layer):
    layers = [make_layer(), make_layer()]
    model = torch.nn.Sequential(layers[0], torch.nn.Linear(8, 8), torch.nn.Sequential(layers[1]))
    assert moe_layers(model) == layers


@pytest.mark.parametrize(
    "form",
    [
        {"capacity": 0.7},
        {"capacity": 1.0, "groups": 2},
        {"capacity": 0.7, "top_k": 1, "shared": True},
        {"capacity": 2.0},
        {},
    ],
)
@pytest.mark.parametrize("lengths", [(4, 11), (0, 7), (1, 0)])
def test_tokens_have_what_they_have_without_the_padding_beside_them(
    form, lengths, make_layer, tokens
):
    """Rows that are filled up: outputs, places and gradients are those of the tokens alone."""
    layer = make_layer(**form)
    is_token = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    alone = tokens[is_token][None]
    expected, kept = layer(alone)[0], layer.kept
    wanted = [tokens, *layer.parameters()]
    gradients = torch.autograd.grad(expected.square().sum(), wanted)
    with padding_marked(layer, Tokens(is_token, sum(lengths))):
        given = layer(tokens)[is_token]
    assert torch.allclose(given, expected, atol=1e-12)
    for a, b in zip(torch.autograd.grad(given.square().sum(), wanted), gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert (layer.kept is None) == (kept is None)
    if kept is not None:
        assert torch.equal(layer.kept[is_token.flatten()], kept)
        assert not layer.kept[~is_token.flatten()].any()
    assert layer.marked_tokens is None


def test_a_batch_that_is_all_padding_passes(make_layer, tokens):
    layer = make_layer(capacity=1.0)
    with padding_marked(layer, Tokens(torch.zeros(tokens.shape[:2], dtype=torch.bool), 0)):
        assert layer(tokens).isfinite().all()
