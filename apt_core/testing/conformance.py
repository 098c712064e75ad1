"""What every layer of a kind must do, whoever wrote it: checks that raise AssertionError."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apt_core.modeling.init import construction_rng, initialize_parameters

Check = tuple[str, Callable[[], None]]


def attention_checks(provider: Any, *, d_model: int = 32, num_heads: int = 4) -> Iterator[Check]:
    """Shape, causality, gradients, determinism and state dict of an attention provider."""

    def build() -> nn.Module:
        return _built(lambda: provider.create_layer(d_model, num_heads, max_seq_len=16))

    yield "attention: shape", lambda: _shape(build(), d_model)
    yield "attention: causal", lambda: _causal(build(), d_model)
    yield "attention: gradients", lambda: _gradients(build(), d_model)
    yield "attention: deterministic", lambda: _deterministic(build, d_model)
    yield "attention: state dict", lambda: _state_dict(build, d_model)


def ffn_checks(provider: Any, *, d_model: int = 32) -> Iterator[Check]:
    """Shape, token-wise results, gradients, determinism and state dict of a feed-forward."""

    def build() -> nn.Module:
        return _built(lambda: provider.create_layer(d_model, 2 * d_model))

    yield "ffn: shape", lambda: _shape(build(), d_model)
    yield "ffn: token-wise", lambda: _causal(build(), d_model, width=1)
    yield "ffn: gradients", lambda: _gradients(build(), d_model)
    yield "ffn: deterministic", lambda: _deterministic(build, d_model)
    yield "ffn: state dict", lambda: _state_dict(build, d_model)


def norm_checks(provider: Any, *, d_model: int = 32) -> Iterator[Check]:
    """Shape, gradients and state dict of a norm."""

    def build() -> nn.Module:
        return _built(lambda: provider.create_layer(d_model))

    yield "norm: shape", lambda: _shape(build(), d_model)
    yield "norm: gradients", lambda: _gradients(build(), d_model)
    yield "norm: state dict", lambda: _state_dict(build, d_model)


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
