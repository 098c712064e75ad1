"""VFT: what it fuses to, its rank, its start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from apt_core.config import parse_config
from apt_core.modeling import ModelBuilder
from apt_core.modeling.layers.ffn import SwiGLU
from apt_core.modeling.layers.vft import VFTProvider
from apt_core.providers.ffn import VFTSettings


def layer_of(d_model=16, d_ff=24, **settings):
    torch.manual_seed(0)
    return VFTProvider(settings).create_layer(d_model, d_ff)


def fused(layer):
    """The SwiGLU of ``layer.fused_weights()``."""
    swiglu = SwiGLU(layer.d_model, layer.d_ff).to(layer.lift.dtype)
    names = ("gate.weight", "up.weight", "down.weight")
    swiglu.load_state_dict(dict(zip(names, layer.fused_weights(), strict=True)))
    return swiglu


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_it_is_the_swiglu_of_its_fused_weights_in_values_and_gradients(rank):
    layer = layer_of(rank=rank).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
            parameter.mul_(parameter.shape[1] ** -0.5)
    results = []
    for feed_forward in (layer, fused(layer)):
        x = torch.randn(
            2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        y = feed_forward(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y, gradient))
    (ours, our_gradient), (theirs, their_gradient) = results
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=0, atol=1e-12)


def test_gradients_reach_it_through_its_fused_weights():
    layer = layer_of()
    sum(weight.square().sum() for weight in layer.fused_weights()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_r_is_the_ratio_and_rank_overrides_it():
    assert layer_of().rank == 4
    assert layer_of(r=2).rank == 8
    assert layer_of(r=5).rank == 3
    assert layer_of(r=2, rank=5).rank == 5
    assert VFTProvider(SimpleNamespace(r=8)).create_layer(16, 24).rank == 2


def test_the_profile_sets_its_rank():
    config = parse_config(
        {"model": {"d_model": 32, "num_heads": 4, "ffn_name": "vft", "vft": {"rank": 6}}}
    )
    assert {block.ffn.rank for block in ModelBuilder(config).build_model().blocks} == {6}


def test_it_starts_orthonormal():
    layer = layer_of(64, 256)
    identity = torch.eye(16)
    torch.testing.assert_close(layer.compress @ layer.compress.T, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.lift.T @ layer.lift, identity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("r", [1, 4])
def test_its_output_starts_smaller_than_swiglus_by_the_root_of_the_ratio(r):
    layer, swiglu = layer_of(64, 256, r=r), SwiGLU(64, 256)
    x = torch.randn(500, 64)
    ratio = layer(x).square().mean() / swiglu(x).square().mean()
    assert 0.75 < ratio * r < 1.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 17}, r"model\.vft\.r: a ratio of 17 leaves no rank .* choose r from 1 to 16"),
        ({"rank": 17}, r"model\.vft\.rank: 17 is more than the 16 of .*: choose at most 16"),
        ({"r": 0}, r"model\.vft\.r: must be at least 1, not 0"),
        ({"rank": 0}, r"model\.vft\.rank: must be at least 1, not 0"),
        ({"rnak": 4}, r"model\.vft\.rnak: unknown key.*rank"),
    ],
)
def test_bad_settings_are_named_with_the_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        layer_of(**settings)


def test_a_provider_tells_whether_its_settings_are_acceptable():
    provider = VFTProvider()
    assert provider.validate_config({"r": 2})
    assert not provider.validate_config({"r": -2})
    assert provider.settings == VFTSettings(r=4, rank=None)
    with pytest.raises(ValueError, match=r"model\.vft\.r"):
        VFTProvider({"r": 100}).flops(64, 256, 1)
