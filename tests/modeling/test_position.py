"""Positions: rotary tables against complex numbers, learned vectors against their rows."""

from __future__ import annotations

import cmath
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apt_core.modeling import initialize_parameters
from apt_core.modeling.layers import RoPEProvider, Rotary
from apt_core.modeling.layers.learned import LearnedPositionProvider


def rotary_of(head_dim, max_seq_len, **settings):
    """A rotary module with tables in fp64."""
    rotary = RoPEProvider(settings).create_rotary(head_dim, max_seq_len).double()
    rotary.reset_buffers()
    return rotary


def turned_by_loops(x, positions, theta):
    """x [B, T, H, R] with the pairs (i, i + R/2) turned, positions [B, T]."""
    half = x.shape[-1] // 2
    expected = torch.empty_like(x)
    for b, sequence in enumerate(positions.tolist()):
        for t, position in enumerate(sequence):
            for h in range(x.shape[2]):
                for i in range(half):
                    pair = complex(x[b, t, h, i], x[b, t, h, i + half])
                    pair *= cmath.exp(1j * position * theta ** (-i / half))
                    expected[b, t, h, i], expected[b, t, h, i + half] = pair.real, pair.imag
    return expected


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_rope_turns_each_pair_by_its_angle(theta):
    x = torch.randn(2, 10, 3, 6, dtype=torch.float64)
    positions = torch.arange(10).expand(2, -1)
    settings = {} if theta == 10_000 else {"theta": theta}
    torch.testing.assert_close(
        rotary_of(6, 10, **settings)(x),
        turned_by_loops(x, positions, theta),
        rtol=0,
        atol=1e-13,
    )


def test_rope_follows_given_positions():
    rotary = rotary_of(4, 10)
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    each = torch.tensor([[0, 1, 2], [7, 3, 5]])
    torch.testing.assert_close(
        rotary(x, each), turned_by_loops(x, each, 10_000.0), rtol=0, atol=1e-13
    )
    shared = torch.tensor([9, 0, 4])
    torch.testing.assert_close(rotary(x, shared), rotary(x, shared.expand(2, -1)))


def test_rope_makes_scores_depend_on_the_distance_alone():
    rotary = rotary_of(8, 40)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        return (rotary(q, torch.tensor([i])) * rotary(k, torch.tensor([j]))).sum()

    torch.testing.assert_close(score(7, 3), score(36, 32), rtol=0, atol=1e-13)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-3


def test_rope_refuses_what_its_tables_do_not_hold():
    with pytest.raises(ValueError, match=r"5 tokens is longer than model\.max_seq_len 4"):
        Rotary(4, 4, 10_000.0)(torch.randn(1, 5, 1, 4))


def test_rope_refuses_an_odd_width():
    with pytest.raises(ValueError, match=r"the head width 5 is odd: .*model\.tva\.r"):
        RoPEProvider().create_rotary(5, 4)


@pytest.mark.parametrize("theta", [1.0, -10.0])
def test_rope_refuses_a_base_that_turns_nothing_or_wrongly(theta):
    with pytest.raises(ValueError, match=r"model\.rope\.theta"):
        RoPEProvider({"theta": theta}).create_rotary(4, 4)


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_a_learned_position_is_the_row_of_its_place(shape):
    layer = LearnedPositionProvider().create_embedding(4, 10)
    positions = torch.randint(0, 10, shape)
    y = layer(positions)
    assert y.shape == (*shape, 4)
    for row, place in zip(y.flatten(0, -2), positions.flatten(), strict=True):
        assert torch.equal(row, layer.weight[place])


def test_learned_positions_start_as_small_as_token_embeddings():
    layer = LearnedPositionProvider().create_embedding(64, 500)
    initialize_parameters(layer, seed=0)
    assert layer.weight.std().item() == pytest.approx(0.04 / 8, rel=0.05)


@pytest.mark.parametrize("sizes", [(0, 8), (8, 0)])
def test_learned_positions_of_no_size_name_the_settings(sizes):
    with pytest.raises(ValueError, match=r"model\.d_model and model\.max_seq_len"):
        LearnedPositionProvider().create_embedding(*sizes)


def test_a_scheme_takes_one_of_the_two_places():
    assert RoPEProvider().create_embedding(8, 4) is None
    assert LearnedPositionProvider().create_rotary(8, 4) is None


class Casts(TorchDispatchMode):
    """Counts the casts."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.to)
        return function(*args, **(kwargs or {}))


def test_rope_casts_its_tables_once_and_again_where_they_change():
    rotary, x = Rotary(4, 10, 10_000.0), torch.randn(2, 3, 2, 4).to(torch.bfloat16)
    positions = torch.tensor([7, 3, 5])

    def turned(x, positions):
        with Casts() as casts:
            found = rotary(x, positions)
        expected = x * rotary.cos[positions].to(x.dtype)
        swapped, sin = x.roll(2, dims=-1), rotary.sin[positions].to(x.dtype)
        assert torch.equal(found, torch.addcmul(expected, swapped, sin))
        return casts.number

    with torch.inference_mode():
        assert turned(x, positions) == 2
    assert turned(x.requires_grad_(), torch.arange(3)) == 0
    rotary(x).sum().backward()
    assert turned(x.detach().float(), positions) == 0
    rotary.cos.mul_(0.5)
    assert [turned(x, positions) for _ in range(2)] == [2, 0]
    rotary.to("meta").to_empty(device="cpu").reset_buffers()
    assert [turned(x, positions) for _ in range(2)] == [2, 0]
    assert [turned(x.half(), positions) for _ in range(2)] == [2, 0]
    assert copy.deepcopy(rotary)._cast is None
