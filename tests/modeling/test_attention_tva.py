from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from apt_core.config import Config
from apt_core.modeling.layers import RoPEProvider, TVAProvider, TVASettings


def layer_of(num_kv_heads=None, position=True, d_model=32, num_heads=4, **settings):
    torch.manual_seed(0)
    layer = TVAProvider(settings).create_layer(
        d_model,
        num_heads,
        max_seq_len=16,
        position=RoPEProvider() if position else None,
        num_kv_heads=num_kv_heads,
    )
    layer = layer.double()
    if layer.compensator is not None:
        nn.init.normal_(layer.compensator.out_weight)
    return layer


def gradients(layer, x):
    x = x.clone().requires_grad_()
    layer(x).square().sum().backward()
    return {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


@pytest.mark.parametrize("s", [0, 2])
@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_fused_equals_the_definition_in_values_and_gradients(s, num_kv_heads):
    fused = layer_of(r=2, s=s, num_kv_heads=num_kv_heads)
    reference = layer_of(r=2, s=s, num_kv_heads=num_kv_heads, factored=True)
    reference.load_state_dict(fused.state_dict())
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    torch.testing.assert_close(fused(x), reference(x), rtol=0, atol=1e-13)
    ours, theirs = gradients(fused, x), gradients(reference, x)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-11)


def test_fused_equals_the_definition_under_a_mask():
    fused, reference = layer_of(r=2), layer_of(r=2, factored=True)
    reference.load_state_dict(fused.state_dict())
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[1, ..., 1:4] = False
    torch.testing.assert_close(fused(x, mask=mask), reference(x, mask=mask), rtol=0, atol=1e-13)
    changed = x.clone()
    changed[1, 1:4] += 1
    seen, unseen = fused(x, mask=mask), fused(changed, mask=mask)
    torch.testing.assert_close(seen[1, 4:], unseen[1, 4:])
    assert not torch.allclose(fused(x)[1, 4:], fused(changed)[1, 4:])


@pytest.mark.parametrize("s", [0, 2])
@pytest.mark.parametrize("factored", [False, True])
def test_no_gradient_reaches_a_later_token(s, factored):
    layer = layer_of(r=2, s=s, factored=factored)
    x = torch.randn(1, 8, 32, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0, 4].sum(), x)
    assert gradient[0, 5:].abs().max() == 0
    assert (gradient[0, :5].abs().sum(-1) > 0).all()


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


def test_attention_depends_on_distance_alone():
    layer = layer_of(r=2, s=0)
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    shifted = layer(x, positions=torch.arange(6) + 5)
    torch.testing.assert_close(layer(x), shifted, rtol=0, atol=1e-6)
    assert not torch.allclose(layer(x), layer(x, positions=torch.arange(6) * 2), atol=1e-3)


class GrowingCache:
    def __init__(self):
        self.held = None

    @property
    def length(self):
        return 0 if self.held is None else self.held[0].shape[2]

    def append(self, key, value):
        new = (key, value)
        if self.held is not None:
            new = tuple(torch.cat(pair, dim=2) for pair in zip(self.held, new, strict=True))
        self.held = new
        return new


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 5], [3, 1, 5]])
def test_feeding_a_sequence_in_pieces_gives_the_whole(pieces):
    layer, cache = layer_of(r=2, num_kv_heads=2), GrowingCache()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    parts = [layer(part, cache=cache) for part in x.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x), rtol=0, atol=1e-12)
    assert cache.held[0].shape == (2, 2, 9, layer.rank)


def test_s_zero_turns_the_compensator_off():
    assert layer_of(s=0).compensator is None
    assert not [name for name in layer_of(s=0).state_dict() if "compensator" in name]


def test_the_compensator_starts_as_if_absent_and_still_learns():
    torch.manual_seed(0)
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


def test_the_compensators_gradients_are_right():
    layer = layer_of(d_model=16, num_heads=2, r=2, s=2)
    compensator = layer.compensator
    names = [name for name, _ in compensator.named_parameters()]

    def call(x, *values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(compensator, given, (x,))

    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in compensator.parameters()]
    assert torch.autograd.gradcheck(call, (x, *values))


def test_the_compensator_is_exact_under_autocast():
    torch.manual_seed(0)
    compensator = TVAProvider({"r": 2, "s": 2}).create_layer(64, 4).compensator
    nn.init.normal_(compensator.out_weight)
    x = torch.randn(2, 5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = compensator(x)
    torch.testing.assert_close(inside, compensator(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("sizes", "settings", "said"),
    [
        ((30, 4), {}, "model.d_model 30 is not divisible by model.num_heads 4"),
        ((32, 4), {"r": 16}, r"model.tva.r: a ratio of 16 leaves no rank .* choose r <= 8"),
        ((32, 4), {"rank": 9}, "model.tva.rank: 9 is more than the width 8"),
        ((32, 4), {"rank": 3}, "the head width 3 is odd: choose an even width .*model.tva.r"),
        ((32, 4), {"r": 0}, "r and rank must be at least 1"),
        ((32, 4), {"rankk": 4}, "model.tva.rankk: unknown key did you mean 'rank'"),
    ],
)
def test_sizes_that_cannot_be_built_name_setting_and_remedy(sizes, settings, said):
    with pytest.raises(ValueError, match=said):
        TVAProvider(settings).create_layer(*sizes, position=RoPEProvider())


def test_calls_that_cannot_be_answered_name_the_remedy():
    layer = layer_of(r=2)
    x = torch.randn(1, 17, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"17 tokens is longer than model.max_seq_len 16"):
        layer(x)
    with pytest.raises(ValueError, match="mask is boolean"):
        layer(x[:, :3], mask=torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"model.num_kv_heads 3"):
        layer_of(num_kv_heads=3)


def test_costs_fall_with_the_rank():
    full, quarter = TVAProvider({"r": 1}), TVAProvider({"r": 4})
    assert full.kv_cache_bytes(64, 4, 10) == 2 * 64 * 10 * 2
    assert full.kv_cache_bytes(64, 4, 10) == 4 * quarter.kv_cache_bytes(64, 4, 10)
    assert quarter.flops(64, 4, 128) < full.flops(64, 4, 128)


def test_the_layers_defaults_are_the_profiles():
    profile = Config.from_dict({}).model.tva
    assert TVASettings.read(profile) == TVASettings()
