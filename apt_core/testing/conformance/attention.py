"""What every attention must do; what masks and caches ask of it is in modules of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from apt_core.modeling.masks import document_mask, document_positions
from apt_core.providers.attention import AttentionSupport
from apt_core.testing.conformance import attention_cache, attention_masks, layers, lengths
from apt_core.testing.conformance.checks import (
    Check,
    LeftOut,
    built_or_refused,
    here,
    refusing,
    require_equal,
)
from apt_core.testing.conformance.layers import Call, leaf, sample
from apt_core.testing.conformance.places import MarkedPlaces

DOCUMENTS = [[0, 0, 0, 1, 1, 1, 1, 1], [4, 5, 5, 5, 5, 7, 7, 7]]
"""Two rows of eight tokens, each packed with documents."""


@dataclass(frozen=True)
class Attention:
    """A provider of attention, and the layers of it that the checks look at: 4 heads of 16."""

    provider: Any
    d_model: int = 64
    num_heads: int = 4
    length: int = 8

    @property
    def supports(self) -> AttentionSupport:
        return getattr(self.provider, "supports", AttentionSupport())

    def claims(self, flag: str) -> None:
        """LeftOut where the provider says that its layers cannot do this."""
        if not getattr(self.supports, flag):
            raise LeftOut(f"supports.{flag} is False")

    def create(self, **options: Any) -> nn.Module:
        options = {"max_seq_len": max(32, self.length), "position": MarkedPlaces(), **options}
        return self.provider.create_layer(self.d_model, self.num_heads, **options)

    def build(self, **options: Any) -> nn.Module:
        return layers.built(partial(self.create, **options))

    def input(self, batch: int = 2, length: int | None = None, seed: int = 0) -> torch.Tensor:
        return sample(batch, self.length if length is None else length, self.d_model, seed=seed)

    @cached_property
    def integers(self) -> dict[str, int]:
        """What a layer may count tokens by."""
        other = replace(self, d_model=48, num_heads=2, length=40)
        return lengths.integers(self.provider, self.create, other.create)

    def places(self) -> list[int]:
        """Those to look at: all of a short text, and of a longer one some, about each integer."""
        if self.length <= 8:
            return list(range(self.length))
        near = {n + d for n in self.integers.values() for d in (-1, 0, 1)}
        some = {0, 1, *sorted(n for n in near if 0 < n < self.length)[-9:]}
        return sorted({*some, self.length // 2, self.length - 2, self.length - 1})

    def calls_of(self, batch: int) -> list[Call]:
        """Ways in which training calls the layer with so many rows."""
        masks = [{"mask": here(torch.ones(batch, 1, 1, self.length, dtype=torch.bool))}]
        return [{}, *(masks if self.supports.mask else [])]

    def at_lengths(self, check: Callable[[Attention], None]) -> None:
        """``check`` on a short text, and on one beyond any window that the settings may mean."""
        check(self)
        longer = replace(self, length=lengths.longer(self.integers))
        try:
            check(longer)
        except (AssertionError, ValueError, RuntimeError, IndexError) as error:
            raise AssertionError(f"a text of {longer.length} tokens: {error}") from error

    def calls(self) -> list[Call]:
        """Ways in which training calls the layer."""
        if not self.supports.mask:
            return [{}]
        documents = here(torch.tensor(DOCUMENTS))
        masked = {
            "mask": document_mask(documents),
            "positions": document_positions(documents),
        }
        return [{}, masked]


def attention_checks(provider: Any) -> list[Check]:
    """The checks of an attention provider; what ``supports`` denies is left out."""
    at = Attention(provider)
    return [
        Check("builds", lambda: _builds(at)),
        Check("shape", lambda: at.at_lengths(_shape)),
        Check("gradients", lambda: at.at_lengths(_gradients)),
        Check("deterministic", lambda: layers.deterministic(at.create, at.input())),
        Check("dropout", lambda: _dropout(at)),
        Check("state dict", lambda: layers.loads_state(at.create, at.input())),
        Check("meta device", lambda: layers.builds_on_meta(at.create, at.input())),
        Check("rows", lambda: at.at_lengths(_rows)),
        Check("causal", lambda: at.at_lengths(_causal)),
        Check("positions", lambda: _positions(at)),
        Check("long sequences", lambda: _long_sequences(at)),
        Check("uneven heads", lambda: _uneven_heads(at)),
        Check("shared heads", lambda: _shared_heads(at)),
        *attention_masks.mask_checks(at),
        *attention_cache.cache_checks(at),
        Check("autocast", lambda: _autocast(at)),
        Check("compile", lambda: _compile(at)),
        Check("no host sync", lambda: _no_host_sync(at)),
        Check("flops", lambda: _flops(at)),
    ]


def _builds(at: Attention) -> None:
    at.build()
    layers.share_nothing(at.create)


def _shape(at: Attention) -> None:
    layers.keeps_shape(at.build(), at.input(), at.input(1, 1))


def _gradients(at: Attention) -> None:
    layers.has_gradients(at.build(), at.input())


def _rows(at: Attention) -> None:
    layers.rows_apart(at.build(), at.input(3), *at.calls_of(3))


def _dropout(at: Attention) -> None:
    dropping = partial(at.create, dropout=0.5)
    layers.drops_nothing_in_evaluation(at.create, dropping, at.input())
    layers.draws_by_the_seed(dropping, at.input())


def _causal(at: Attention) -> None:
    """No output depends on a later input: not by its gradient, and not by its value."""
    whole = here(torch.ones(at.length, at.length, dtype=torch.bool))
    calls: list[Call] = [{}, {"mask": whole}] if at.supports.mask else [{}]
    layer = at.build()
    for call in calls:
        for training in (False, True):
            _blind_to_gradients(layer.train(training), at, call)
        _blind_to_values(layer.eval(), at, call)


def _blind_to_gradients(layer: nn.Module, at: Attention, call: Call) -> None:
    x = leaf(at.input())
    y = layer(x, **call)
    for place in at.places():
        (grad,) = torch.autograd.grad(
            (y[:, place] * sample(2, at.d_model, seed=1)).sum(),
            x,
            retain_graph=True,
            allow_unused=True,
        )
        if grad is None:
            continue
        later = (grad[:, place + 1 :] != 0).any(-1).any(0).nonzero().flatten().tolist()
        assert not later, (
            f"the output at {place} depends on the input at {place + 1 + later[0]}"
            + (" in training" if layer.training else "")
        )


@torch.no_grad()
def _blind_to_values(layer: nn.Module, at: Attention, call: Call) -> None:
    x, other = at.input(), at.input(seed=1)
    y = layer(x, **call)
    for seen in at.places()[1:]:
        changed = layer(torch.cat([x[:, :seen], other[:, seen:]], 1), **call)
        require_equal(changed[:, :seen], y[:, :seen], f"with other inputs from {seen} on")


@torch.no_grad()
def _positions(at: Attention) -> None:
    """0..T-1 where none are given; [T] and [B, T] alike; and heeded, where they matter."""
    layer, x, places = at.build(), at.input(), here(torch.arange(at.length))
    y = layer(x)
    require_equal(layer(x, positions=places), y, "positions 0..T-1, [T]")
    require_equal(layer(x, positions=places.expand(2, -1)), y, "positions 0..T-1, [B, T]")
    own = torch.stack([places, 2 * places + 1])
    together = layer(x, positions=own)
    for row in range(2):
        alone = layer(x[row : row + 1], positions=own[row])
        require_equal(together[row : row + 1], alone, "a row with positions of its own")
    without = layers.same_weights(layer, at.build(position=None))
    if not without(x).equal(y):
        assert not layer(x, positions=2 * places + 1).equal(y), "positions are ignored"


@torch.no_grad()
def _long_sequences(at: Attention) -> None:
    layer = at.build(max_seq_len=at.length)
    layer(at.input())
    with refusing("a sequence longer than max_seq_len", "max_seq_len"):
        layer(at.input(length=at.length + 1))
    if hasattr(layer, "create_cache"):
        cache = layer.create_cache(at.length + 1)
        layer(at.input(), cache=cache)
        with refusing("decoding beyond max_seq_len", "max_seq_len"):
            layer(at.input(length=1), cache=cache)


@torch.no_grad()
def _uneven_heads(at: Attention) -> None:
    """Heads that do not divide d_model: a layer that works, or a ValueError when it is built."""
    layer = built_or_refused(
        partial(layers.built, partial(at.provider.create_layer, at.d_model, 5)),
        f"d_model {at.d_model} with 5 heads",
        "num_heads",
    )
    if layer is not None:
        layers.works(layer, at.input())


@torch.no_grad()
def _shared_heads(at: Attention) -> None:
    """Fewer key and value heads: layers that work, or a ValueError that names the setting."""
    for kv_heads in (2, 1):
        layer = built_or_refused(
            partial(at.build, num_kv_heads=kv_heads),
            f"num_kv_heads={kv_heads}",
            "model.num_kv_heads",
        )
        if layer is not None:
            layers.works(layer, at.input())
    with refusing("num_kv_heads=3 for 4 heads", "model.num_kv_heads"):
        at.create(num_kv_heads=3)


def _autocast(at: Attention) -> None:
    at.claims("autocast")
    layers.autocasts(at.build(), at.input(), *at.calls())


def _compile(at: Attention) -> None:
    at.claims("compile")
    layers.compiles(at.build(), at.input(), *at.calls())


def _no_host_sync(at: Attention) -> None:
    layers.never_waits(at.build(), at.input(), *at.calls())


def _flops(at: Attention) -> None:
    layers.costs(at.provider, lambda n: at.provider.flops(at.d_model, at.num_heads, n))
