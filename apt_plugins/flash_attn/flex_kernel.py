"""Attention in a window by torch's FlexAttention, which makes a kernel for it on a GPU.

Shapes: B batch, T tokens, H query heads, K key and value heads, R their width, n blocks of BLOCK
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from apt_core.modeling.masks import document_positions
from apt_plugins.flash_attn.visibility import LastMade, Sight

BLOCK = 128
NARROWEST = 16
"""The narrowest head that the kernel takes."""

MOST_GRAPHS = 16
"""The number of shapes that may be compiled; a run has few."""


def takes(q: Tensor, k: Tensor, dropout: float) -> bool:
    """Whether the kernel computes this: a whole text on a GPU, without dropout."""
    whole = q.shape[2] == k.shape[2] > 1 and q.shape[3] >= NARROWEST
    return q.is_cuda and whole and not dropout and find_spec("triton") is not None


def compiled() -> Callable[..., Tensor]:
    """The function that makes the kernels and calls them."""
    options: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": MOST_GRAPHS}
    made: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False, **options)
    return made


def flexed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    sight: Sight,
    kept: LastMade,
    kernel: Callable[..., Any] = flex_attention,
) -> Tensor:
    """q [B, H, T, R], k and v [B, K, T, R] to [B, H, T, R]; ``documents`` are ids int64 [B, T]."""
    length, device = q.shape[2], q.device
    mask = kept.of(
        documents,
        ("blocks", length, sight, device),
        partial(block_mask, documents, length, sight, device),
    )
    if torch.compiler.is_compiling():
        kernel = flex_attention  # compiled with what is around it
    mixed: Tensor = kernel(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return mixed


def block_mask(
    documents: Tensor | None, length: int, sight: Sight, device: torch.device
) -> BlockMask:
    """What each of ``length`` tokens sees, with the blocks that hold nothing of it left out.

    It is made of what is known of whole blocks, so that nothing of T x T is: torch's own
    ``create_block_mask`` looks at every pair of tokens.
    """
    count = -(-length // BLOCK)
    first = BLOCK * torch.arange(count, device=device)
    last = (first + BLOCK - 1).clamp_max(length - 1)
    some = first <= last[:, None]  # [queries, keys]
    whole = last <= first[:, None]
    full = first + BLOCK <= length
    whole = whole & full & full[:, None]
    if sight.window is not None:
        near = first[:, None] - last < sight.window
        whole = whole & (last[:, None] - first < sight.window)
    else:
        near = torch.ones_like(some)
    positions: Tensor | None = None
    opening = first < sight.prefix
    if documents is not None:
        positions = document_positions(documents)
        # The documents of a row in the order in which they stand.
        order = (positions == 0).cumsum(1)
        begins, ends = order[:, first], order[:, last]
        reached = ends[:, None, :] >= begins[:, :, None]
        whole = whole & (begins[:, None, :] == ends[:, :, None])
        padded = torch.full((len(documents), count * BLOCK), length, device=device)
        padded[:, :length] = positions
        opening = (padded.unflatten(1, (count, BLOCK)) < sight.prefix).any(2)[:, None]
        some = some & reached
    some = some & (near | opening)
    partial_blocks, whole_blocks = (_listed(blocks) for blocks in (some & ~whole, whole))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if sight.window is not None:
            close = query - key < sight.window
            if sight.prefix:
                place = key if positions is None else positions[batch, key]
                close = close | (place < sight.prefix)
            seen = seen & close
        if documents is not None:
            seen = seen & (documents[batch, query] == documents[batch, key])
        return seen

    return BlockMask.from_kv_blocks(
        *partial_blocks,
        *whole_blocks,
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [..., n, n] as their number in each row and their indices, those of the row first:
    int32 [B, 1, n] and [B, 1, n, n]."""
    blocks = blocks if blocks.dim() == 3 else blocks[None]
    marks = blocks[:, None].to(torch.int32)
    order = marks.argsort(dim=3, descending=True, stable=True)
    return marks.sum(3, dtype=torch.int32), order.to(torch.int32)
