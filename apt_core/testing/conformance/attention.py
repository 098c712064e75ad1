"""What every attention must do; what masks and caches ask of it is in modules of their own."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from apt_core.modeling.layers.rope import RoPEProvider
from apt_core.providers.plain import PlainAttention
from apt_core.testing.conformance import attention_cache, attention_masks, layers
from apt_core.testing.conformance.checks import (
    Check,
    built_or_refused,
    here,
    refusing,
    require_equal,
)
from apt_core.testing.conformance.examined_attention import Attention
from apt_core.testing.conformance.layers import Call, leaf, sample
from apt_core.testing.conformance.plain_forms import attended, computes_its_form


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
        Check("plain form", lambda: _plain_form(at)),
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


def _plain_form(at: Attention) -> None:
    for options in ({}, {"num_kv_heads": 2}):
        try:
            layer = at.build(position=RoPEProvider(), **options)
        except ValueError:
            continue  # it has no such heads, which another check looks at
        computes_its_form(layer, at.input(), PlainAttention, attended)


def _flops(at: Attention) -> None:
    layers.costs(at.provider, lambda n: at.provider.flops(at.d_model, at.num_heads, n))
