"""Masks and positions for rows that pack several documents or contain padding.

B is the number of rows, T of tokens per row, S of keys: T, and before them those in a cache. A mask
is boolean, True where attention is allowed, in addition to the causal mask; or it is document ids,
int64 [B, S], which cost nothing to make: tokens see their own document only. A run of padding is
one document more. The attention's output is zero at a position that may see nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


def document_mask(document_ids: Tensor, length: int | None = None) -> Tensor:
    """The boolean mask [B, 1, T, S] for rows that pack several documents: tokens see their own
    document only.

    ``document_ids`` [B, S] differ between the documents of a row; the last ``length`` tokens, by
    default all, are the queries. With :func:`document_positions` the outputs of a document are the
    same as if it were alone.
    """
    queries = document_ids if length is None else document_ids[:, -length:]
    return (queries[:, :, None] == document_ids[:, None, :])[:, None]


def takes_documents(module: nn.Module) -> bool:
    """Whether a model or an attention takes document ids as its mask, which it says by an attribute
    ``takes_documents``. All others need the boolean mask."""
    return bool(getattr(module, "takes_documents", False))


def are_documents(mask: Tensor | None) -> bool:
    """Whether ``mask`` is document ids, by its type."""
    return mask is not None and mask.dtype == torch.int64


def check_documents(document_ids: Tensor, batch: int, total: int) -> Tensor:
    """``document_ids``. Raises ValueError unless they are [B, S] for a ``batch`` of rows with
    ``total`` keys."""
    given, wanted = list(document_ids.shape), [batch, total]
    if given != wanted:
        raise ValueError(
            f"document ids of shape {given} for [B, S] = {wanted}: give each row's keys a number, "
            "or a boolean mask"
        )
    return document_ids


def document_positions(document_ids: Tensor) -> Tensor:
    """The position of each token in its document, int64 [B, T]. Documents must be contiguous in
    ``document_ids`` [B, T]."""
    places = torch.arange(document_ids.shape[1], device=document_ids.device)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return places - torch.where(starts, places, 0).cummax(dim=1).values


def padding_mask(is_token: Tensor) -> Tensor:
    """The mask [B, 1, 1, T] for padded rows: no token sees padding.

    ``is_token`` [B, T] is true (or 1) at tokens and false at padding, on either side.
    """
    return is_token.bool()[:, None, None, :]


def padding_positions(is_token: Tensor) -> Tensor:
    """The position of each token among the tokens of its row, int64 [B, T]; 0 at left padding."""
    return (is_token.long().cumsum(dim=1) - 1).clamp_min(0)


class Tokens(NamedTuple):
    """Where a batch has tokens and not padding: ``is_token``, bool [B, T], and their ``number``,
    known on the host."""

    is_token: Tensor
    number: int


@contextmanager
def padding_marked(model: nn.Module, tokens: Tokens | None) -> Iterator[None]:
    """Tell the layers of ``model`` which positions are padding while the context lasts; None means
    no padding.

    A layer in which positions compete, such as those routed to the same expert, has an attribute
    ``marked_tokens``, which is set to ``tokens`` in the context and to None outside. Other layers
    need not know: causal attention does not see later padding.
    """
    asking = [] if tokens is None else [m for m in model.modules() if hasattr(m, "marked_tokens")]
    for module in asking:
        module.marked_tokens = tokens
    try:
        yield
    finally:
        for module in asking:
            module.marked_tokens = None
