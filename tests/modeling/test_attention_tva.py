from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from apt_core.modeling.layers import RoPEProvider, TVAProvider
from apt_core.modeling.layers.attention_tva import FactoredTVAAttention

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def layer_of(num_kv_heads=None, d_model=32, num_heads=4, **settings):
    layer = TVAProvider(settings).create_layer(
        d_model,
        num_heads,
        max_seq_len=16,
        position=RoPEProvider(),
        num_kv_heads=num_kv_heads,
    )
    return layer.double()


def assert_equal(ours, theirs, **call):
    """The two layers give the same output, and the same gradients to the input and to every
    parameter whose name they share."""
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    direction, results = torch.randn_like(x), []
    for layer in (ours, theirs):
        given = x.clone().requires_grad_()
        y = layer(given, **call)
        y.backward(direction)
        grads = {name: p.grad for name, p in layer.named_parameters()}
        results.append({"y": y.detach(), "x": given.grad, **grads})
    left, right = results
    shared = left.keys() & right.keys()
    assert shared >= {"y", "x", "qkv_weight", "out_weight"}
    for name in shared:
        assert left[name].abs().max() > 1e-6, name
        torch.testing.assert_close(left[name], right[name], **EXACT)
    return shared


@pytest.mark.parametrize("settings", [{"s": 0}, {"s": 2}, {"s": 2, "qk_norm": True}], ids=str)
@pytest.mark.parametrize(("r", "num_kv_heads"), [(2, None), (2, 2), (4, 1), (1, None)])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_equals_the_definition_in_values_and_gradients(
    attention_of, settings, r, num_kv_heads, masked
):
    fused = attention_of("tva_default", {"r": r, **settings}, num_kv_heads).layer()
    reference = attention_of(
        "tva_default", {"r": r, "factored": True, **settings}, num_kv_heads
    ).layer()
    assert isinstance(reference, FactoredTVAAttention)
    assert not isinstance(fused, FactoredTVAAttention)
    mask = torch.rand(2, 1, 9, 9) < 0.7 if masked else None
    shared = assert_equal(fused, reference, mask=mask)
    assert shared == {"y", "x", *dict(fused.named_parameters())}


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
@pytest.mark.parametrize("factored", [False, True])
def test_at_full_rank_without_compression_it_is_multi_head_attention(
    attention_of, qk_norm, num_kv_heads, factored
):
    settings = {"r": 1, "s": 0, "qk_norm": qk_norm, "factored": factored}
    tva = attention_of("tva_default", settings, num_kv_heads).layer()
    mha = attention_of("mha", {"qk_norm": qk_norm}, num_kv_heads).layer()
    with torch.no_grad():
        tva.compress.copy_(torch.eye(8))
        tva.lift.copy_(torch.eye(8))
    mha.load_state_dict({name: tva.state_dict()[name] for name in mha.state_dict()})
    assert_equal(tva, mha)


def test_it_is_multi_head_attention_of_the_fused_matrices(attention_of):
    layer = attention_of("tva_default", {"r": 2, "s": 0}, 2).layer()
    qkv, out = layer.projections()
    assert (qkv.shape, out.shape) == ((8 * 4, 32), (32, 4 * 4))
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    q, k, v = F.linear(x, qkv).unflatten(2, (-1, 4)).transpose(1, 2).split([4, 2, 2], dim=1)
    q, k = layer.rotary(q.transpose(1, 2)), layer.rotary(k.transpose(1, 2))
    seen = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v, is_causal=True, enable_gqa=True
    )
    expected = F.linear(seen.transpose(1, 2).flatten(2), out)
    torch.testing.assert_close(layer(x), expected, **EXACT)


def test_r_is_the_ratio_and_rank_overrides_it():
    layer = TVAProvider({"r": 4}).create_layer(d_model=768, num_heads=12)
    assert layer.rank == 16
    assert layer(torch.randn(1, 3, 768)).shape == (1, 3, 768)
    assert layer_of(r=4, rank=6).rank == 6
    assert TVAProvider(SimpleNamespace(r=2, s=0)).create_layer(32, 4).rank == 4


def test_compress_and_lift_start_orthonormal():
    layer = layer_of(r=2)
    eye = torch.eye(layer.rank, dtype=torch.float64)
    torch.testing.assert_close(layer.compress @ layer.compress.T, eye, atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.lift.T @ layer.lift, eye, atol=1e-6, rtol=0)


def test_a_cache_keeps_the_weights_of_its_first_tokens(attention_of):
    layer = attention_of("tva_default", {"r": 2, "s": 2}).layer()
    x = torch.randn(1, 4, 32, dtype=torch.float64)
    before, cache = layer(x), layer.create_cache(4)
    with torch.no_grad():
        layer(x[:, :1], cache=cache)
        for name in ("qkv_weight", "lift", "compensator.basis", "compensator.normal_weight"):
            layer.get_parameter(name).mul_(torch.rand_like(layer.get_parameter(name)))
        torch.testing.assert_close(layer(x[:, 1:], cache=cache), before[:, 1:], **EXACT)
    assert not torch.allclose(layer(x), before, atol=1e-3)


@pytest.mark.parametrize("num_kv_heads", [None, 2])
@pytest.mark.parametrize("r", [2, 4])
def test_flops_are_those_of_the_fused_layer_without_forming_it(r, num_kv_heads):
    provider = TVAProvider({"r": r})
    with torch.device("meta"):
        layer = provider.create_layer(64, 4, num_kv_heads=num_kv_heads)
        x = torch.empty(1, 48, 64)
    with FlopCounterMode(display=False) as whole:
        layer(x)
    with FlopCounterMode(display=False) as forming:
        layer.projections()
    told = provider.flops(64, 4, 48, num_kv_heads=num_kv_heads)
    assert told + forming.get_total_flops() == whole.get_total_flops()


def test_s_zero_turns_the_compensator_off():
    assert layer_of(s=0).compensator is None
    assert not [name for name in layer_of(s=0).state_dict() if "compensator" in name]


def test_the_compensator_starts_as_if_absent_and_still_learns():
    layer = TVAProvider({"r": 2, "s": 2}).create_layer(32, 4)
    x = torch.randn(2, 5, 32)
    assert layer.compensator(x).abs().max() == 0
    layer(x).square().sum().backward()
    assert layer.compensator.out_weight.grad.abs().max() > 0


def test_the_compensator_keeps_its_basis_orthonormal_and_its_gate_in_play():
    compensator = layer_of(d_model=256, num_heads=4, r=2, s=2).compensator
    with torch.no_grad():
        compensator.basis.add_(torch.randn_like(compensator.basis))
    q = compensator.orthonormal_basis()
    eye = torch.eye(compensator.rank, dtype=torch.float64)
    torch.testing.assert_close(q.T @ q, eye, rtol=0, atol=1e-10)
    x = torch.randn(4000, 256, dtype=torch.float64)
    share = (x @ q).square().sum(-1) / x.square().sum(-1)
    in_spreads = ((1 - share).sqrt() - compensator.center) / compensator.spread
    assert abs(in_spreads.mean()) < 0.3
    assert 0.8 < in_spreads.std() < 1.2


def test_the_compensators_gradients_are_right(attention_of):
    compensator = attention_of("tva_default", {"r": 2, "s": 2}).layer(16, 2).compensator
    names = [name for name, _ in compensator.named_parameters()]

    def call(x, *values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(compensator, given, (x,))

    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in compensator.parameters()]
    assert torch.autograd.gradcheck(call, (x, *values))


def test_the_compensator_is_exact_under_autocast():
    compensator = TVAProvider({"r": 2, "s": 2}).create_layer(64, 4).compensator
    nn.init.normal_(compensator.out_weight)
    x = torch.randn(2, 5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = compensator(x)
    torch.testing.assert_close(inside, compensator(x), rtol=0, atol=0)
    wide = compensator.double()(x.double())
    torch.testing.assert_close(inside.double(), wide, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "settings", "said"),
    [
        ((30, 4), {}, "model.d_model 30 is not divisible by model.num_heads 4"),
        ((32, 4), {"r": 16}, r"model.tva.r: a ratio of 16 leaves no rank .* choose r from 1 to 8"),
        ((32, 4), {"rank": 9}, "model.tva.rank: 9 is more than the head dimension 8"),
        ((32, 4), {"rank": 3}, "the head width 3 is odd: choose an even width .*model.tva.r"),
        ((32, 4), {"r": 0}, "model.tva.r: must be at least 1, not 0"),
        ((32, 4), {"rankk": 4}, "model.tva.rankk: unknown key .did you mean 'rank'"),
    ],
)
def test_sizes_that_cannot_be_built_name_setting_and_remedy(sizes, settings, said):
    with pytest.raises(ValueError, match=said):
        TVAProvider(settings).create_layer(*sizes, position=RoPEProvider())


def test_costs_fall_with_the_rank():
    full, quarter = TVAProvider({"r": 1}), TVAProvider({"r": 4})
    assert full.kv_cache_bytes(64, 4, 10) == 2 * 64 * 10 * 2
    assert full.kv_cache_bytes(64, 4, 10) == 4 * quarter.kv_cache_bytes(64, 4, 10)
    assert quarter.flops(64, 4, 128) < full.flops(64, 4, 128)
