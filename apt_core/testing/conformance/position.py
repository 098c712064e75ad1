"""What every provider of positions must do: a rotary module, or an embedding, or both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apt_core.testing.conformance import layers
from apt_core.testing.conformance.checks import Check, LeftOut, here, refusing, require_equal
from apt_core.testing.conformance.layers import built, sample

WIDTH, MAX_SEQ_LEN, LENGTH, HEADS = 16, 32, 8, 3


class _Turning(nn.Module):
    """A rotary module as a layer from positions to the queries that it turns."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self.queries = nn.Parameter(torch.randn(2, 2 * LENGTH, HEADS, WIDTH))

    def forward(self, positions: Tensor) -> Tensor:
        queries = self.queries[:, : positions.shape[-1]]
        turned = self.rotary(queries, positions)
        assert turned.shape == queries.shape, (
            f"rotary: {list(queries.shape)} became {list(turned.shape)}"
        )
        return turned


class _Embedding(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, positions: Tensor) -> Tensor:
        found = self.embedding(positions)
        shape = (*positions.shape, WIDTH)
        assert found.shape == shape, f"embedding: {list(found.shape)} should be {list(shape)}"
        return found.expand(2, -1, -1)


def position_checks(provider: Any) -> list[Check]:
    """The checks of a provider of positions; each looks at whatever it offers."""
    every = partial(_every, provider)
    places = partial(_places, LENGTH)
    return [
        Check("builds", lambda: every(_builds)),
        Check("shape", lambda: every(_shape)),
        Check("positions", lambda: every(_positions)),
        Check("default positions", lambda: _default_positions(provider)),
        Check("long sequences", lambda: _long_sequences(provider)),
        Check("gradients", lambda: every(lambda c: layers.has_gradients(built(c), places()))),
        Check("deterministic", lambda: every(lambda c: layers.deterministic(c, places()))),
        Check("state dict", lambda: every(lambda c: layers.loads_state(c, places()))),
        Check("meta device", lambda: every(lambda c: layers.builds_on_meta(c, places()))),
        Check("compile", lambda: every(lambda c: layers.compiles(built(c), places()))),
        Check("no host sync", lambda: every(lambda c: layers.never_waits(built(c), places()))),
    ]


def _places(length: int) -> Tensor:
    return here(torch.arange(length))


def _every(provider: Any, check: Callable[[layers.Create], None]) -> None:
    """``check`` the module for attention and the one for the backbone, where there are such."""
    given = {
        _Turning: partial(provider.create_rotary, WIDTH, MAX_SEQ_LEN),
        _Embedding: partial(provider.create_embedding, WIDTH, MAX_SEQ_LEN),
    }
    offered = {wrap: create for wrap, create in given.items() if create() is not None}
    assert offered, "neither create_rotary nor create_embedding gives a module"
    for wrap, create in offered.items():
        check(partial(_wrapped, wrap, create))


def _wrapped(wrap: Callable[[nn.Module], nn.Module], create: layers.Create) -> nn.Module:
    return wrap(create())


def _builds(create: layers.Create) -> None:
    built(create)


def _shape(create: layers.Create) -> None:
    module = built(create)
    for positions in (_places(LENGTH), _places(2 * LENGTH).view(2, -1)):
        y = module(positions)
        assert y.dtype == torch.float32, f"of float32 comes {y.dtype}"
        assert y.isfinite().all(), "values that are not finite"


def _positions(create: layers.Create) -> None:
    """[T] and [B, T] agree; what a place gives depends on its position alone; all differ."""
    module, places = built(create), _places(LENGTH)
    y = module(places)
    require_equal(module(places.expand(2, -1)), y, "positions [B, T]")
    rows = torch.stack([places, places + 9])
    require_equal(module(rows)[0], y[0], "a row of positions beside another")
    require_equal(module(rows)[1], module(rows[1])[1], "a row of positions of its own")
    before = [module(torch.cat([places, other]))[:, :LENGTH] for other in (places, places + 9)]
    require_equal(before[0], before[1], "a position before others")
    assert not module(places + 1).equal(module(places)), "the position makes no difference"


def _default_positions(provider: Any) -> None:
    rotary, x = _rotary(provider), sample(2, LENGTH, HEADS, WIDTH)
    require_equal(rotary(x), rotary(x, _places(LENGTH)), "without positions")


def _long_sequences(provider: Any) -> None:
    rotary = _rotary(provider)
    with refusing("a sequence longer than max_seq_len", "max_seq_len"):
        rotary(sample(2, MAX_SEQ_LEN + 1, HEADS, WIDTH))


def _rotary(provider: Any) -> nn.Module:
    rotary = provider.create_rotary(WIDTH, MAX_SEQ_LEN)
    if rotary is None:
        raise LeftOut("it gives attention no module")
    return built(lambda: rotary)
