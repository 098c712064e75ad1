"""Providers of whole models (kind ``backbone``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, Strict

from apt_core.providers.base import Provider
from apt_core.sections import Section, Size

if TYPE_CHECKING:
    from torch import nn


class NgramSettings(Section):
    """``model.ngram``: embeddings of the last few tokens together, by hash."""

    orders: Annotated[
        tuple[Annotated[int, Field(ge=2, le=64)], ...],
        Strict(False),
        Field(max_length=63),
    ] = Field(default=(2, 3, 4), description="Lengths of the n-grams, in tokens.")
    buckets: Annotated[tuple[Size, ...], Strict(False), Field(max_length=63)] = Field(
        default=(4096, 16384, 16384),
        description="Rows of each order's table; n-grams that share a row share what they learn.",
    )
    lr_scale: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=6.0, description="Learning rate of the tables over that of the token embeddings."
    )


class BackboneProvider(Provider, ABC):
    """Assembles layers into a language model, which keeps its blocks in an ``nn.ModuleList``:
    by it the matrices that Muon takes and the groups that FSDP2 shards are found.

    The model is called as ``model(input_ids, *, mask=None, positions=None, caches=None)`` with
    input_ids int64 [B, T], and returns :class:`~apt_core.types.ModelOutput` with logits [B, T, V].
    ``caches`` is what ``model.create_caches(max_length)`` gave: one
    :class:`~apt_core.providers.attention.DecodingCache` a layer. A model without ``create_caches``,
    or whose ``create_caches`` gives None, is decoded by computing everything anew.

    ``mask`` is boolean; a model with the attribute ``takes_documents = True`` is given the document
    ids of packed rows, int64 [B, T], and hands on to each attention what that takes
    (:mod:`apt_core.modeling.masks`).

    A model and its blocks that can be exported have ``plain()``: it gives
    ``apt_core.modeling.plain.PlainParts``, and a :class:`~apt_core.providers.plain.PlainBlock`.
    """

    norms_per_block: ClassVar[int] = 2

    @abstractmethod
    def create_block(
        self, *, attention: nn.Module, ffn: nn.Module, norms: Sequence[nn.Module], dropout: float
    ) -> nn.Module:
        """One block of the model from its layers; ``norms`` are as many as ``norms_per_block``."""

    @abstractmethod
    def create_model(
        self,
        *,
        vocab_size: int,
        d_model: int,
        max_seq_len: int,
        blocks: Sequence[nn.Module],
        final_norm: nn.Module,
        position: nn.Module | None = None,
        tie_embeddings: bool = False,
        dropout: float = 0.0,
        logits_soft_cap: float | None = None,
        ngram: nn.Module | None = None,
        embedding_norm: nn.Module | None = None,
    ) -> nn.Module:
        """The model around ``blocks``.

        Where there are any: ``position`` is an embedding to add, ``ngram`` another, called as
        ``ngram(input_ids, positions=…, cache=…)``, ``embedding_norm`` normalises their sum, and
        ``logits_soft_cap`` bounds the logits. ``ngram`` and ``embedding_norm`` are passed only
        where the profile sets them.
        """
