from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from apt_core.modeling import probe_layer
from apt_core.modeling.layers import (
    RMSNormProvider,
    RoPEProvider,
    Rotary,
    SwiGLUProvider,
    TVAProvider,
)
from apt_core.providers import Provider


def test_swiglu_is_its_formula():
    layer = SwiGLUProvider().create_layer(8, 20)
    x = torch.randn(2, 3, 8)
    expected = (F.silu(x @ layer.gate.weight.T) * (x @ layer.up.weight.T)) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_rope_turns_each_pair_by_its_angle():
    rotary = Rotary(6, 10)
    x = torch.randn(2, 10, 3, 6)
    turned = rotary(x)
    as_complex = torch.complex(x[..., :3], x[..., 3:])
    angles = torch.arange(10)[:, None] * 10_000 ** (-torch.arange(3) / 3)
    expected = as_complex * torch.polar(torch.ones(10, 3), angles)[:, None]
    torch.testing.assert_close(turned[..., :3], expected.real, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned[..., 3:], expected.imag, rtol=0, atol=1e-5)


def test_rope_follows_given_positions_for_each_sequence():
    rotary = Rotary(4, 10)
    x = torch.randn(2, 3, 1, 4)
    positions = torch.tensor([[0, 1, 2], [7, 3, 5]])
    turned = rotary(x, positions)
    for row, place in enumerate(positions[1]):
        single = rotary(x[1:, row : row + 1], place[None])
        torch.testing.assert_close(turned[1, row], single[0, 0])


def test_rope_refuses_what_its_tables_do_not_hold():
    with pytest.raises(ValueError, match=r"model.max_seq_len 4"):
        Rotary(4, 4)(torch.randn(1, 5, 1, 4))


def test_rmsnorm_leaves_unit_mean_square():
    x = torch.randn(2, 3, 16) * 5
    y = RMSNormProvider().create_layer(16)(x)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(2, 3), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("kind", "provider"),
    [("attention", TVAProvider()), ("ffn", SwiGLUProvider()), ("norm", RMSNormProvider())],
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
