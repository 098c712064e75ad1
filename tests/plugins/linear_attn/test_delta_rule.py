"""The rule in chunks against a loop over its definition: values, gradients, documents, types."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.functional import normalize

from apt_plugins.linear_attn import delta_rule
from apt_plugins.linear_attn.convolution import convolved
from apt_plugins.linear_attn.delta_rule import Sizes, chunked, stepped
from apt_plugins.linear_attn.gated_norm import EPS, gated_norm

SIZES = Sizes(heads=2, keys=8, values=6)
B = 2


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A few chunks a block, so that texts of several chunks have several blocks."""
    monkeypatch.setattr(delta_rule, "BLOCK", 2 * B * SIZES.heads * 64 * 64)


def inputs(length, dtype=torch.float32, seed=0):
    """Channels, g and β, with decays from slow to those that leave nothing after a token."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    g = -torch.exp(2.0 * drawn(B, length, SIZES.heads) - 3.0)
    found = drawn(B, length, SIZES.channels), g, drawn(B, length, SIZES.heads).sigmoid()
    state = drawn(B, *SIZES)
    return [x.to(dtype).requires_grad_() for x in (*found, state)]


def by_definition(channels, g, beta, sizes, state):
    """S_t = e^g (I - β k kᵀ) S_{t-1} + β k vᵀ and o = Sᵀ q / sqrt(K), with the matrices written
    out."""
    keys = sizes.keys
    q, k, v = sizes.split(channels)
    q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    eye, outputs = torch.eye(keys, dtype=channels.dtype), []
    for t in range(channels.shape[1]):
        strength, key = beta[:, t, :, None, None], k[:, t, :, :, None]
        moved = eye - strength * key @ key.mT
        state = g[:, t, :, None, None].exp() * (moved @ state)
        state = state + strength * key @ v[:, t, :, None, :]
        outputs.append((state.mT @ q[:, t, :, :, None]).squeeze(-1) / keys**0.5)
    return torch.stack(outputs, 1), state


def gradients(found, leaves):
    weights = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) for y in found]
    return torch.autograd.grad(
        sum((y * w).sum() for y, w in zip(found, weights, strict=True)), leaves
    )


close = partial(torch.testing.assert_close, atol=1e-6, rtol=0)


def off(given, expected):
    """The error, root mean square, relative to the value's."""
    return ((given - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (5, 64), (63, 64), (75, 64), (200, 16)])
def test_chunks_give_what_the_definition_gives_and_its_gradients(length, chunk):
    leaves = inputs(length, torch.float64)
    *given, state = leaves
    expected = by_definition(*given, SIZES, state)
    wanted = gradients(expected, leaves)
    for rule in (
        lambda: chunked(*given, SIZES, state=state, chunk=chunk),
        lambda: stepped(*given, SIZES, state),
    ):
        found = rule()
        for mine, its in zip(found, expected, strict=True):
            assert off(mine, its) < 1e-6  # lengths are normalised with an epsilon
        for mine, its in zip(gradients(found, leaves), wanted, strict=True):
            assert off(mine, its) < 1e-6


def test_chunks_are_the_recurrence_in_fp32():
    for length in (63, 75, 500, 1000):
        *given, state = inputs(length)
        with torch.no_grad():
            expected = stepped(*given, SIZES, state)
            found = chunked(*given, SIZES, state=state)
        assert off(found[0], expected[0]) < 1e-5
        assert off(found[1], expected[1]) < 1e-5


def test_the_gradients_are_those_of_finite_differences():
    *given, state = inputs(11, torch.float64)
    documents = torch.tensor([[0] * 4 + [1] * 7, [0, 1, 1, 2, 3, 3, 3, 3, 3, 3, 4]])
    with_state = [*given, state]

    def of(channels, g, beta, state):
        return chunked(channels, g, beta, SIZES, state=state, documents=documents, chunk=4)

    assert torch.autograd.gradcheck(of, with_state, fast_mode=True)
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    before = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, before, weight: convolved(x, weight, before=before), (x, before, weight)
    )
    out = torch.randn(1, 5, 2, 3, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(1, 5, 6, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gated_norm, (out, gate, scale))


def test_the_convolution_and_the_gate_are_those_of_torch(monkeypatch):
    torch.manual_seed(0)
    for module in ("convolution", "gated_norm"):
        monkeypatch.setattr(f"apt_plugins.linear_attn.{module}.BLOCK", 1)
    x, before, weight = torch.randn(2, 70, 5), torch.randn(2, 3, 5), torch.randn(5, 4)
    given = torch.cat([before, x], 1).mT
    expected = torch.nn.functional.conv1d(given, weight[:, None], groups=5).mT
    found = convolved(x, weight, before=before)
    torch.testing.assert_close(found, torch.nn.functional.silu(expected))
    out, gate, scale = torch.randn(2, 70, 2, 3), torch.randn(2, 70, 6), torch.randn(3)
    normed = torch.nn.functional.rms_norm(out, (3,), scale, EPS).flatten(-2)
    torch.testing.assert_close(gated_norm(out, gate, scale), normed * gate.sigmoid() * gate)


def test_the_state_begins_anew_with_each_document_and_goes_on_with_that_of_the_cache():
    documents = torch.tensor([[0] * 20 + [1] * 30 + [2] * 25, [1] * 64 + [2] * 10 + [3]])
    leaves = inputs(75, torch.float64)
    *given, state = leaves
    together = chunked(*given, SIZES, state=state, documents=documents, chunk=16)
    got = gradients(together, leaves)
    for row in range(B):
        for document in documents[row].unique().tolist():
            places = documents[row] == document
            alone = [x[row : row + 1, places].detach().requires_grad_() for x in given]
            first = (state if document == 0 else torch.zeros_like(state))[row : row + 1]
            expected, last = by_definition(*alone, SIZES, first)
            torch.testing.assert_close(
                together[0][row : row + 1, places], expected, atol=1e-6, rtol=0
            )
            weights = torch.linspace(-1, 1, together[0].numel()).view_as(together[0])
            (wanted,) = torch.autograd.grad(
                (expected * weights[row : row + 1, places]).sum(), alone[0], retain_graph=True
            )
            if document != documents[row, -1]:  # the last one's state has a gradient as well
                close(got[0][row : row + 1, places], wanted)
            else:
                close(together[1][row : row + 1], last)


def test_large_decays_and_equal_keys_give_nothing_that_is_not_finite():
    """Differences of decays overflow above the diagonal, and powers of A for equal keys."""
    channels, g, beta, state = inputs(130)
    with torch.no_grad():
        channels[..., : 2 * SIZES.heads * SIZES.keys] = 1.0
        beta.fill_(1.0)
        g[:, ::3] = -200.0
    found = chunked(channels, g, beta, SIZES, state=state)
    assert off(found[0], stepped(channels, g, beta, SIZES, state)[0]) < 1e-5
    assert all(grad.isfinite().all() for grad in gradients(found, (channels, g, beta, state)))
