"""What every layer of a kind must do, whoever wrote it: checks that raise AssertionError."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apt_core.modeling.init import construction_rng, initialize_parameters
from apt_core.modeling.layers import RoPEProvider

Check = tuple[str, Callable[[], None]]


def attention_checks(provider: Any, *, d_model: int = 32, num_heads: int = 4) -> Iterator[Check]:
    """Shape, causality, mask, cache, gradients, determinism and state dict of attention."""

    def build(position: Any = None) -> nn.Module:
        return _built(
            lambda: provider.create_layer(d_model, num_heads, max_seq_len=16, position=position)
        )

    yield "shape", lambda: _shape(build(), d_model)
    yield "causal", lambda: _causal(build(), d_model)
    yield "mask", lambda: _mask(build(), d_model)
    yield "cache", lambda: _cache(build(RoPEProvider()), d_model)
    yield "gradients", lambda: _gradients(build(), d_model)
    yield "deterministic", lambda: _deterministic(build, d_model)
    yield "state dict", lambda: _state_dict(build, d_model)


def ffn_checks(provider: Any, *, d_model: int = 32) -> Iterator[Check]:
    """Shape, token-wise results, gradients, determinism and state dict of a feed-forward."""

    def build() -> nn.Module:
        return _built(lambda: provider.create_layer(d_model, 2 * d_model))

    yield "shape", lambda: _shape(build(), d_model)
    yield "token-wise", lambda: _causal(build(), d_model, width=1)
    yield "gradients", lambda: _gradients(build(), d_model)
    yield "deterministic", lambda: _deterministic(build, d_model)
    yield "state dict", lambda: _state_dict(build, d_model)


def norm_checks(provider: Any, *, d_model: int = 32) -> Iterator[Check]:
    """Shape, gradients and state dict of a norm."""

    def build() -> nn.Module:
        return _built(lambda: provider.create_layer(d_model))

    yield "shape", lambda: _shape(build(), d_model)
    yield "gradients", lambda: _gradients(build(), d_model)
    yield "state dict", lambda: _state_dict(build, d_model)


CHECKS: dict[str, Callable[[Any], Iterator[Check]]] = {
    "attention": attention_checks,
    "ffn": ffn_checks,
    "norm": norm_checks,
}


def _built(create: Callable[[], nn.Module]) -> nn.Module:
    with construction_rng(0, "conformance"):
        layer = create()
    initialize_parameters(layer, seed=0)
    return layer.eval()


def _input(d_model: int) -> Tensor:
    return torch.randn(2, 8, d_model, generator=torch.Generator().manual_seed(0))


def _shape(layer: nn.Module, d_model: int) -> None:
    for length in (1, 8):
        x = _input(d_model)[:, :length]
        y = layer(x)
        assert y.shape == x.shape, f"{list(x.shape)} became {list(y.shape)}"
        assert y.dtype == x.dtype, f"{x.dtype} became {y.dtype}"
        assert torch.isfinite(y).all(), "values that are not finite"


def _causal(layer: nn.Module, d_model: int, width: int | None = None) -> None:
    """No output depends on a later input; with ``width`` 1, on no other input at all."""
    for position in (0, 3, 7):
        x = _input(d_model).requires_grad_()
        layer(x)[:, position].square().sum().backward()
        assert x.grad is not None
        seen = x.grad.abs().amax(dim=(0, 2)) > 0
        first = 0 if width is None else position
        outside = [i for i in range(8) if seen[i] and not first <= i <= position]
        assert not outside, f"the output at {position} depends on the inputs at {outside}"


def _mask(layer: nn.Module, d_model: int) -> None:
    """A mask narrows what is seen, and one that allows everything changes nothing."""
    x = _input(d_model).requires_grad_()
    mask = torch.ones(8, 8, dtype=torch.bool)
    whole = layer(x)
    assert torch.allclose(layer(x, mask=mask), whole, atol=1e-5), "a mask of True changes it"
    mask[3:, 2] = False
    layer(x, mask=mask)[:, 3:].square().sum().backward()
    assert x.grad is not None and not x.grad[:, 2].any(), "a token that is masked is seen"


def _cache(layer: nn.Module, d_model: int) -> None:
    """A sequence that is fed in pieces gives what it gives as a whole."""
    x, cache = _input(d_model), GrowingCache()
    pieces = torch.cat([layer(piece, cache=cache) for piece in x.split((3, 1, 4), 1)], dim=1)
    assert cache.length == 8, f"the cache holds {cache.length} positions after 8 tokens"
    difference = (pieces - layer(x)).abs().max().item()
    assert difference < 1e-4, f"fed in pieces, the output differs by {difference:.2g}"


class GrowingCache:
    """A :class:`~apt_core.providers.attention.KeyValueCache` that grows by concatenation."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        return 0 if self.held is None else self.held[0].shape[2]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.held is not None:
            key, value = torch.cat([self.held[0], key], 2), torch.cat([self.held[1], value], 2)
        self.held = key, value
        return self.held


def _gradients(layer: nn.Module, d_model: int) -> None:
    x = _input(d_model).requires_grad_()
    layer(x).square().mean().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0, "no gradient reaches the input"
    without = [n for n, p in layer.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"no gradient reaches {', '.join(without)}"


def _deterministic(build: Callable[[], nn.Module], d_model: int) -> None:
    x = _input(d_model)
    layer = build()
    assert layer(x).equal(layer(x)), "two calls with one input differ"
    torch.manual_seed(1234)
    assert build()(x).equal(layer(x)), "two layers of one seed differ"


def _state_dict(build: Callable[[], nn.Module], d_model: int) -> None:
    x = _input(d_model)
    layer, other = build(), build()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.01)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert other(x).equal(layer(x)), "a layer that loaded the state computes something else"
