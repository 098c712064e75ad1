"""Attention in a window by SDPA, block by block: time and memory grow with the window, not with the
square of the text. It runs wherever SDPA does, with dropout too.

Shapes: B batch, T queries, S keys, of which the last T are those of the queries, H query heads, K
key and value heads, R their width, P the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_core.modeling.masks import document_positions
from apt_plugins.flash_attn.visibility import LastMade, Sight

BLOCK = 128
"""Queries of a block. 8,192 tokens with a window of 256 (4 heads of 64, forward and backward, one
thread) took 179 ms with 64, 201 ms with 128, 251 ms with 256, and 1,833 ms without a window."""


@dataclass(frozen=True)
class Band:
    """The queries at the places from ``start`` to ``end``, and the ``first`` key in the window of
    one of them."""

    first: int
    start: int
    end: int

    def keys_before(self, sight: Sight) -> int:
        """How many keys of the prefix are before the window, of a text that is one document."""
        return min(sight.prefix, self.first)


@dataclass(frozen=True)
class Plan:
    """What each band sees: ``masks`` [nq, nk] or [B, 1, nq, nk], None where that is the causal
    rule, and ``prefixes`` int64 [B, bands, P], the keys of the prefix of the document that reaches
    into a band from before its window."""

    masks: Sequence[Tensor | None]
    prefixes: Tensor | None


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    sight: Sight,
    kept: LastMade,
    **options: Any,
) -> Tensor:
    """q [B, H, T, R], k and v [B, K, S, R] to [B, H, T, R]; ``documents`` are ids int64 [B, S],
    ``options`` those of SDPA."""
    length, total = q.shape[2], k.shape[2]
    bands = [
        Band(sight.first(start), start, min(start + BLOCK, total))
        for start in range(total - length, total, BLOCK)
    ]
    if documents is None:
        plan = kept.of(
            None,
            (length, total, sight, q.dtype, q.device),
            lambda: Plan(_masks(bands, sight, q.dtype, q.device), None),
        )
    else:
        plan = kept.of(documents, (length, total, sight), lambda: _plan_of(documents, bands, sight))
    keys, values = (_seen(x, bands, sight, plan.prefixes, documents is None) for x in (k, v))
    mixed = []
    for number, part in enumerate(q.split(BLOCK, dim=2)):
        mask = plan.masks[number]
        causal = mask is None and part.shape[2] > 1
        mixed.append(
            F.scaled_dot_product_attention(
                part, keys[number], values[number], attn_mask=mask, is_causal=causal, **options
            )
        )
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)


def _masks(
    bands: Sequence[Band], sight: Sight, dtype: torch.dtype, device: torch.device
) -> list[Tensor | None]:
    """What each band sees of a text that is one document, as what is added to scores."""
    made: dict[tuple[int, ...], Tensor] = {}
    masks: list[Tensor | None] = []
    for band in bands:
        size, before = band.end - band.start, band.keys_before(sight)
        whole = band.first == band.start == 0 and sight.holds(band.end)
        if whole or (size == 1 and (before == band.first or before == sight.prefix)):
            masks.append(None)
            continue
        # Those of all bands in the middle of a text are the same.
        key = size, band.end - band.first, before, max(0, sight.prefix - band.first)
        if key not in made:
            queries = torch.arange(band.start, band.end, device=device)
            keys = torch.arange(band.first, band.end, device=device)
            seen = sight.near(queries, keys) | ((keys < sight.prefix) & (keys <= queries[:, None]))
            seen = torch.cat([seen.new_ones(size, before), seen], dim=1)
            zeros = torch.zeros(seen.shape, dtype=dtype, device=device)
            made[key] = zeros.masked_fill_(~seen, float("-inf"))
        masks.append(made[key])
    return masks


def _plan_of(documents: Tensor, bands: Sequence[Band], sight: Sight) -> Plan:
    """What each band sees of rows of ``documents``."""
    places = torch.arange(documents.shape[1], device=documents.device)
    positions = document_positions(documents) if sight.prefix else None
    masks: list[Tensor | None] = []
    prefixes = []
    for band in bands:
        queries, keys = places[band.start : band.end], places[band.first : band.end]
        own = documents[:, band.start : band.end, None]
        seen = sight.near(queries, keys)
        if positions is not None:
            opening = positions[:, None, band.first : band.end] < sight.prefix
            seen = seen | (opening & (keys <= queries[:, None]))
        seen = seen & (own == documents[:, None, band.first : band.end])
        if positions is not None:
            # Of those that begin before the window, only one document can reach into it.
            begin = band.first - positions[:, band.first]
            prefix = begin[:, None] + torch.arange(sight.prefix, device=places.device)
            before = prefix < band.first
            prefix = prefix.clamp_max(documents.shape[1] - 1)
            same = own == documents.gather(1, prefix)[:, None]
            seen = torch.cat([same & before[:, None], seen], dim=2)
            prefixes.append(prefix)
        masks.append(seen[:, None])
    return Plan(masks, torch.stack(prefixes, dim=1) if prefixes else None)


def _seen(
    x: Tensor, bands: Sequence[Band], sight: Sight, prefixes: Tensor | None, whole: bool
) -> Sequence[Tensor]:
    """Of keys or values x [B, K, S, R] those that each band looks at; the text is one document if
    ``whole``."""
    ranges = [(band.first, band.end) for band in bands]
    before = [band.keys_before(sight) if whole else 0 for band in bands]
    count = len(ranges)
    parts = _cut(x, (*ranges, *((0, number) for number in before if number)))
    found, opening = list(parts[:count]), iter(parts[count:])
    for number, size in enumerate(before):
        if size:
            found[number] = torch.cat([next(opening), found[number]], dim=2)
    if prefixes is None:
        return found
    # Taken at once, since the gradient of each taking is as large as x.
    places = prefixes.flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    taken = x.gather(2, places).split(prefixes.shape[2], dim=2)
    return [torch.cat(pair, dim=2) for pair in zip(taken, found, strict=True)]


def _cut(x: Tensor, ranges: tuple[tuple[int, int], ...]) -> Sequence[Tensor]:
    """The places of x [B, K, S, R] in each of ``ranges``."""
    if torch.is_grad_enabled() and x.requires_grad:
        parts: Sequence[Tensor] = _Cut.apply(x, ranges)
        return parts
    return [x[:, :, first:end] for first, end in ranges]


class _Cut(torch.autograd.Function):
    """Ranges that overlap. Plain slices would make a gradient as large as x of each of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranges: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
        ctx.ranges, ctx.shape = ranges, x.shape
        return tuple(x[:, :, first:end] for first, end in ranges)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = gradients[0].new_zeros(ctx.shape)
        for (first, end), gradient in zip(ctx.ranges, gradients, strict=True):
            whole[:, :, first:end] += gradient
        return whole, None
