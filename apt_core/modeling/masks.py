"""Masks and positions for batches in which a row is not one whole text.

Legend: B rows, T tokens a row. Masks are boolean, True where attention is allowed; every attention
narrows its causal rule by them. A position that is left with nothing to see gets nothing from the
attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


def document_mask(document_ids: Tensor) -> Tensor:
    """Rows that pack several documents: tokens see their own document alone.

    ``document_ids`` [B, T] is any number that tells the documents of a row apart; the mask is
    [B, 1, T, T]. With :func:`document_positions`, what a document gives is what it gives alone.
    """
    return (document_ids[:, :, None] == document_ids[:, None, :])[:, None]


def document_positions(document_ids: Tensor) -> Tensor:
    """Each token's place in its own document, int64 [B, T], from ``document_ids`` [B, T], whose
    documents are contiguous."""
    places = torch.arange(document_ids.shape[1], device=document_ids.device)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return places - torch.where(starts, places, 0).cummax(dim=1).values


def padding_mask(is_token: Tensor) -> Tensor:
    """Rows that are filled up: no token sees the filling.

    ``is_token`` [B, T] is true (or 1) at tokens and false at the filling, on either side; the mask
    is [B, 1, 1, T].
    """
    return is_token.bool()[:, None, None, :]


def padding_positions(is_token: Tensor) -> Tensor:
    """Each token's place among the tokens of its row, int64 [B, T]; 0 at filling before them."""
    return (is_token.long().cumsum(dim=1) - 1).clamp_min(0)


class Tokens(NamedTuple):
    """The positions of a batch that are no padding: ``is_token``, bool [B, T], and their
    ``number``, which is known without asking the device."""

    is_token: Tensor
    number: int


@contextmanager
def padding_marked(model: nn.Module, tokens: Tokens | None) -> Iterator[None]:
    """Let the layers of ``model`` know inside which positions of the batch are padding; None says
    that there is none.

    A layer in which positions stand in each other's way, as those that share the places of an
    expert do, has an attribute ``marked_tokens``. It is ``tokens`` inside, and None elsewhere.
    Other layers need not know: no token sees padding that comes after it.
    """
    asking = [] if tokens is None else [m for m in model.modules() if hasattr(m, "marked_tokens")]
    for module in asking:
        module.marked_tokens = tokens
    try:
        yield
    finally:
        for module in asking:
            module.marked_tokens = None
