"""What decoding with a cache asks of every attention that offers one."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from apt_core.modeling.masks import padding_mask, padding_positions
from apt_core.modeling.row_decoding import Products, RowStep, takes_part
from apt_core.testing.conformance.checks import (
    Check,
    LeftOut,
    built_or_refused,
    here,
    require_equal,
)
from apt_core.testing.conformance.examined_attention import Attention
from apt_core.testing.conformance.lengths import cuts


def cache_checks(at: Attention) -> list[Check]:
    return [
        Check("cache", lambda: at.at_lengths(_cache)),
        Check("cache with a mask", lambda: at.at_lengths(_cache_with_mask)),
        Check("cache truncated", lambda: at.at_lengths(_truncated)),
        Check("cache forked", lambda: at.at_lengths(_forked)),
        Check("rows of a batch", lambda: at.at_lengths(_decoded_in_rows)),
        Check("cache bytes", lambda: at.at_lengths(_bytes)),
    ]


def _caching(at: Attention, **options: Any) -> nn.Module:
    layer = at.build(**options)
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
    for sizes in cuts(T, at.integers):
        cache = layer.create_cache(T)
        assert cache.length == 0, f"a new cache tells a length of {cache.length}"
        pieces = _fed(layer, cache, *x.split(sizes, 1))
        require_equal(pieces, whole, f"fed in pieces of {_sizes_text(sizes)} tokens")
    for kv_heads in (2, 1):
        shared = built_or_refused(partial(_caching, at, num_kv_heads=kv_heads), "num_kv_heads")
        if shared is not None:
            pieces = _fed(shared, shared.create_cache(T), *x.split([3, *[1] * (T - 3)], 1))
            require_equal(pieces, shared(x), f"with num_kv_heads {kv_heads}, fed in pieces")
    other = at.input(batch=1, seed=1)
    first, second = layer.create_cache(T), layer.create_cache(T + 3)
    outputs = [
        (_fed(layer, first, a), _fed(layer, second, b))
        for a, b in zip(x.split(2, 1), other.split(2, 1), strict=True)
    ]
    require_equal(torch.cat([a for a, _ in outputs], 1), whole, "one of two caches in turn")
    require_equal(torch.cat([b for _, b in outputs], 1), layer(other), "the other of two caches")


def _sizes_text(sizes: list[int]) -> str:
    """``[3, 1, 1, 1, 1] -> '3, then 4 of 1'``."""
    runs = [(size, len(list(same))) for size, same in groupby(sizes)]
    return ", then ".join(f"{count} of {size}" if count > 1 else f"{size}" for size, count in runs)


@torch.no_grad()
def _cache_with_mask(at: Attention) -> None:
    """Texts of different lengths, filled up on the left, are decoded as each is alone."""
    layer = _caching(at)
    at.claims("mask")
    T, filling = at.length, 2
    x, is_token = at.input(), here(torch.ones(2, T, dtype=torch.bool))
    is_token[0, :filling] = False
    places = padding_positions(is_token)
    cache, outputs, end = layer.create_cache(T), [], 0
    for piece in x.split((4, 1, T // 2 - 3, *[1] * (T - T // 2 - 2)), 1):
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
    T, x, tried = at.length, at.input(), at.input(seed=1)
    for kept in (3, T - 2, T - 1, T // 2, 1):
        layer = _caching(at)
        cache, whole = layer.create_cache(T), layer(x)
        if not hasattr(cache, "truncate"):
            raise LeftOut("its cache has no truncate")
        _fed(layer, cache, x[:, :kept], *tried[:, kept : T - 1].split(T, 1)[: kept < T - 1])
        cache.truncate(kept)
        assert cache.length == kept, f"cut to {kept}, the cache tells a length of {cache.length}"
        again = _fed(layer, cache, *x[:, kept:].split(max(1, T // 3), 1))
        require_equal(again, whole[:, kept:], f"after a truncate of {T - 1} tokens to {kept}")


@torch.no_grad()
def _forked(at: Attention) -> None:
    """A fork and the cache that it was made of continue a text in two ways."""
    T, x, other = at.length, at.input(), at.input(seed=1)
    layer, kept = _caching(at), T // 2
    cache, whole = layer.create_cache(T), layer(x)
    if not hasattr(cache, "fork"):
        raise LeftOut("its cache has no fork")
    _fed(layer, cache, x[:, :kept])
    fork, unused = cache.fork(), layer.create_cache(T).fork()
    assert (fork.length, unused.length) == (kept, 0), (
        f"forks of caches of {kept} and 0 tokens tell lengths of {fork.length} and {unused.length}"
    )
    mixed = torch.cat([x[:, :kept], other[:, kept:]], 1)
    # By turns, so that one that writes to the other's memory is seen.
    pieces = zip(x[:, kept:].split(1, 1), other[:, kept:].split(1, 1), strict=True)
    outputs = [(_fed(layer, cache, a), _fed(layer, fork, b)) for a, b in pieces]
    require_equal(torch.cat([a for a, _ in outputs], 1), whole[:, kept:], "a cache that was forked")
    require_equal(torch.cat([b for _, b in outputs], 1), layer(mixed)[:, kept:], "a fork")


@torch.no_grad()
def _decoded_in_rows(at: Attention) -> None:
    """Texts of different lengths, each in a slot of one cache, are decoded as each is alone."""
    layer, x, T = at.build(), at.input(), at.length
    if not takes_part(layer, "rows"):
        raise LeftOut("the layer has no rows of its own: its texts are decoded one by one")
    decoding = layer.rows(Products())
    held = [T // 2, T - 3]
    outputs: list[list[Tensor]] = [[], []]

    def feed(first: int, starts: list[int], length: int) -> None:
        places = here(torch.tensor(starts))[:, None] + here(torch.arange(length))
        span, mixed = max(starts) + length, len({*starts}) > 1
        step = RowStep(places, first=first, span=span, mask=mixed, last=max(31, T - 1))
        rows = range(first, first + len(starts))
        new = [x[row, start : start + length] for row, start in zip(rows, starts, strict=True)]
        y = decoding(torch.cat(new), step).unflatten(0, (-1, length))
        for row, added in zip(rows, y, strict=True):
            outputs[row].append(added)

    for row, known in enumerate(held):
        feed(row, [0], known)
    for length in (1, 2):
        feed(0, held, length)
        held = [known + length for known in held]
    for row, known in enumerate(held):
        alone = layer(x[row : row + 1, :known])[0]
        require_equal(torch.cat(outputs[row]), alone, f"row {row} of two, decoded together")


@torch.no_grad()
def _bytes(at: Attention) -> None:
    """``kv_cache_bytes`` is what a cache that is full takes."""
    _caching(at)
    if not hasattr(at.provider, "kv_cache_bytes"):
        raise LeftOut("the provider does not tell its kv_cache_bytes")
    for kv_heads in (None, 2, 1):
        held = [
            built_or_refused(
                partial(_held_bytes, at, pieces, num_kv_heads=kv_heads), "num_kv_heads"
            )
            for pieces in (at.length, 1)
        ]
        if None in held:
            continue
        told = at.provider.kv_cache_bytes(
            at.d_model, at.num_heads, at.length, num_kv_heads=kv_heads, bytes_per_value=4
        )
        assert held == [told, told], (
            f"kv_cache_bytes says {told} where the cache holds {held[0]} bytes "
            f"({at.length} tokens, num_kv_heads {kv_heads}), and {held[1]} after these one by one"
        )


def _held_bytes(at: Attention, piece: int, **options: Any) -> int:
    """What the cache of one text takes that was fed in pieces of so many tokens."""
    layer = at.build(**options)
    cache = layer.create_cache(at.length)
    if not hasattr(cache, "nbytes"):
        raise LeftOut("its cache does not tell its nbytes")
    _fed(layer, cache, *at.input(batch=1).split(piece, 1))
    return int(cache.nbytes)
