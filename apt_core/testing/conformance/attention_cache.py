"""What decoding with a cache asks of every attention that offers one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apt_core.modeling.masks import padding_mask, padding_positions
from apt_core.testing.conformance.checks import Check, LeftOut, built_or_refused, require_equal

if TYPE_CHECKING:
    from apt_core.testing.conformance.attention import Attention


def cache_checks(at: Attention) -> list[Check]:
    return [
        Check("cache", lambda: _cache(at)),
        Check("cache with a mask", lambda: _cache_with_mask(at)),
        Check("cache truncated", lambda: _truncated(at)),
        Check("cache bytes", lambda: _bytes(at)),
    ]


def _caching(at: Attention) -> nn.Module:
    layer = at.build()
    if not hasattr(layer, "create_cache"):
        raise LeftOut("the layer has no create_cache: decoding computes everything anew")
    return layer


def _fed(layer: nn.Module, cache: Any, *pieces: Tensor) -> Tensor:
    """What the layer gives for x in pieces, with the length of the cache looked at."""
    outputs, length = [], cache.length
    for piece in pieces:
        outputs.append(layer(piece, cache=cache))
        length += piece.shape[1]
        assert cache.length == length, (
            f"the cache tells a length of {cache.length} after {length} tokens"
        )
    return torch.cat(outputs, 1)


@torch.no_grad()
def _cache(at: Attention) -> None:
    """Fed in pieces, a text gives what it gives as a whole, whatever else is being decoded."""
    has = hasattr(at.build(), "create_cache")
    assert has or not at.supports.cache, "supports.cache is True, but there is no create_cache"
    assert at.supports.cache or not has, "there is create_cache, but supports.cache is False"
    layer, x, T = _caching(at), at.input(), at.length
    whole = layer(x)
    for sizes in ([1] * T, [3, 1, T - 4], [T]):
        cache = layer.create_cache(T)
        assert cache.length == 0, f"a new cache tells a length of {cache.length}"
        pieces = _fed(layer, cache, *x.split(sizes, 1))
        require_equal(pieces, whole, f"fed in pieces of {', '.join(map(str, sizes))} tokens")
    other = at.input(batch=1, seed=1)
    first, second = layer.create_cache(T), layer.create_cache(T + 3)
    outputs = [
        (_fed(layer, first, a), _fed(layer, second, b))
        for a, b in zip(x.split(2, 1), other.split(2, 1), strict=True)
    ]
    require_equal(torch.cat([a for a, _ in outputs], 1), whole, "one of two caches in turn")
    require_equal(torch.cat([b for _, b in outputs], 1), layer(other), "the other of two caches")


@torch.no_grad()
def _cache_with_mask(at: Attention) -> None:
    """Texts of different lengths, filled up on the left, are decoded as each is alone."""
    layer = _caching(at)
    at.claims("mask")
    T, filling = at.length, 2
    x, is_token = at.input(), torch.ones(2, T, dtype=torch.bool)
    is_token[0, :filling] = False
    places = padding_positions(is_token)
    cache, outputs, end = layer.create_cache(T), [], 0
    for piece in x.split((4, 1, T - 5), 1):
        start, end = end, end + piece.shape[1]
        seen = padding_mask(is_token[:, :end])
        now = places[:, start:end]
        outputs.append(layer(piece, mask=seen, positions=now, cache=cache))
    y = torch.cat(outputs, 1)
    require_equal(y[:1, filling:], layer(x[:1, filling:]), "a filled up row, fed in pieces")
    require_equal(y[1:], layer(x[1:]), "a row beside a filled up one, fed in pieces")


@torch.no_grad()
def _truncated(at: Attention) -> None:
    """What a cache forgets might never have been fed."""
    layer, T, kept = _caching(at), at.length, 3
    cache = layer.create_cache(T)
    if not hasattr(cache, "truncate"):
        raise LeftOut("its cache has no truncate")
    x, tried = at.input(), at.input(seed=1)
    _fed(layer, cache, x[:, :kept], tried[:, kept : T - 1])
    cache.truncate(kept)
    assert cache.length == kept, f"cut to {kept}, the cache tells a length of {cache.length}"
    again = _fed(layer, cache, x[:, kept:])
    require_equal(again, layer(x)[:, kept:], "after a truncate")


@torch.no_grad()
def _bytes(at: Attention) -> None:
    """``kv_cache_bytes`` is what a cache that is full takes."""
    _caching(at)
    if not hasattr(at.provider, "kv_cache_bytes"):
        raise LeftOut("the provider does not tell its kv_cache_bytes")
    for kv_heads in (None, 2, 1):
        layer = built_or_refused(partial(at.build, num_kv_heads=kv_heads), "num_kv_heads")
        if layer is None:
            continue
        held = _held_bytes(layer, at)
        told = at.provider.kv_cache_bytes(
            at.d_model, at.num_heads, at.length, num_kv_heads=kv_heads, bytes_per_value=4
        )
        assert told == held, (
            f"kv_cache_bytes says {told} where the cache holds {held} bytes "
            f"({at.length} tokens, num_kv_heads {kv_heads})"
        )


def _held_bytes(layer: nn.Module, at: Attention) -> int:
    """What the cache of one text takes."""
    cache = layer.create_cache(at.length)
    if not hasattr(cache, "nbytes"):
        raise LeftOut("its cache does not tell its nbytes")
    layer(at.input(batch=1), cache=cache)
    return int(cache.nbytes)
