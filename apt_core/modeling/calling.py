"""The one way to call a model on a batch, so that masks, positions and padding reach the layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from apt_core.data.batches import Batch
from apt_core.data.packing.rows import IGNORED
from apt_core.errors import ProviderError
from apt_core.modeling.masks import (
    Tokens,
    document_mask,
    document_positions,
    padding_marked,
    takes_documents,
)
from apt_core.modeling.modes import eval_mode
from apt_core.types import ModelOutput

Result = TypeVar("Result")


def forward_batch(forward: Callable[..., Result], model: nn.Module, batch: Batch) -> Result:
    """The result of ``forward``, which is the ``model`` itself or calls it, for ``batch``.

    It is called as ``forward(input_ids, **rows)``: ``rows`` are the mask and the positions of
    packed documents, and empty for plain windows. The mask is the document ids for a model that
    takes them, which makes no other unless a layer needs it. Layers that ask know which positions
    are padding
    (:func:`~apt_core.modeling.masks.padding_marked`).

    Raises ProviderError for a model that does not take what the batch needs.
    """
    rows: dict[str, Tensor] = {}
    if batch.document_ids is not None or batch.positions is not None:
        rows = _rows(model, batch)
    tokens = _tokens(batch)
    if tokens is None:
        return forward(batch.input_ids, **rows)
    with padding_marked(model, tokens):
        return forward(batch.input_ids, **rows)


def _tokens(batch: Batch) -> Tokens | None:
    """The positions that are not padding; None if the batch has no padding."""
    if batch.token_count == batch.targets.numel():
        return None
    return Tokens(batch.token_mask(), batch.token_count)


def _rows(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    rows: dict[str, Tensor] = {}
    if batch.document_ids is not None:
        ids = batch.document_ids
        rows["mask"] = ids if takes_documents(model) else document_mask(ids)
        rows["positions"] = document_positions(batch.document_ids)
    if batch.positions is not None:
        rows["positions"] = batch.positions
    # By name: what takes anything may look at nothing.
    taken = inspect.signature(model.forward).parameters
    if missing := [name for name in rows if name not in taken]:
        raise ProviderError(
            f"{type(model).__name__}.forward takes no {' and no '.join(missing)}, which a batch of "
            "packed documents needs: add the arguments (apt_core.providers.BackboneProvider), or "
            "choose another model.backbone"
        )
    return rows


def forward_with(weights: Mapping[str, Tensor], model: nn.Module, batch: Batch) -> ModelOutput:
    """The output of ``model`` for ``batch`` with ``weights`` in place of its own."""

    def forward(ids: Tensor, **rows: Tensor) -> ModelOutput:
        return functional_call(model, dict(weights), (ids,), rows)

    return forward_batch(forward, model, batch)


@torch.no_grad()
def losses_in_fp32(model: nn.Module, batch: Batch, ids: int | None = None) -> Tensor:
    """The cross-entropy of each token of ``batch`` [B*T], in nats, computed in fp32 in eval mode; 0
    where there is no target. It is over the first ``ids`` alone, if given."""
    with eval_mode(model):
        logits = forward_batch(model, model, batch).logits[..., :ids]
    # One sequence at a time, since the loss needs as much memory as the logits.
    return torch.cat(
        [
            F.cross_entropy(row.float(), targets, ignore_index=IGNORED, reduction="none")
            for row, targets in zip(logits, batch.targets, strict=True)
        ]
    )
