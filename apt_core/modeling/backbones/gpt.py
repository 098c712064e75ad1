"""The default backbone: a pre-norm decoder-only transformer (``backbone:gpt``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.log import get_logger
from apt_core.modeling.backbones.gpt_rows import BlockRows, GPTRows
from apt_core.modeling.growth import (
    CannotGrow,
    Larger,
    Sizes,
    grow_parts,
    resize_linear,
    resized,
)
from apt_core.modeling.init import embedding_std, normal_
from apt_core.modeling.layers.ngram import NgramEmbedding
from apt_core.modeling.masks import are_documents, check_documents, document_mask, takes_documents
from apt_core.modeling.plain import NotPlain, PlainParts, plain_parts, without_form
from apt_core.modeling.row_decoding import Products, function_of, takes_part
from apt_core.providers.attention import DecodingCache
from apt_core.providers.backbone import BackboneProvider
from apt_core.providers.plain import (
    Beyond,
    PlainAttention,
    PlainBlock,
    PlainExperts,
    PlainFFN,
    PlainNorm,
)
from apt_core.types import ModelOutput

log = get_logger("apt.modeling")

LOGIT_GAIN = 16.0
"""The initial gain of the final norm. It makes the logits, which are computed with small
embeddings, of order one, and lets them follow the embeddings' steps fast."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(
        self,
        attention: nn.Module,
        ffn: nn.Module,
        norms: Sequence[nn.Module],
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = norms
        self.attention, self.ffn, self.dropout = attention, ffn, dropout

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: DecodingCache | None = None,
    ) -> Tensor:
        """x [B, T, D] to [B, T, D]."""
        normed = self.attention_norm(x)
        x = x + self._drop(self.attention(normed, mask=mask, positions=positions, cache=cache))
        return x + self._drop(self.ffn(self.ffn_norm(x)))

    def rows(self, products: Products) -> BlockRows | None:
        """The block for decoding rows; None if its attention takes no part in that."""
        if not (takes_part(self, "rows") and takes_part(self.attention, "rows")):
            return None
        return BlockRows(
            function_of(self.attention_norm, products),
            self.attention.rows(products),
            function_of(self.ffn_norm, products),
            function_of(self.ffn, products),
        )

    @property
    def writes_stream(self) -> tuple[str, ...]:
        """Those of its layers. Raises AttributeError where a layer does not say."""
        layers = {"attention": self.attention, "ffn": self.ffn}
        return tuple(f"{name}.{own}" for name, la in layers.items() for own in la.writes_stream)

    def grow(self, sizes: Sizes) -> dict[str, Larger]:
        """Take on larger ``sizes``; layers that have none of them are left alone. Raises CannotGrow
        with what cannot."""
        parts: dict[str, nn.Module] = {}
        if sizes.d_model is not None:
            parts |= {"attention_norm": self.attention_norm, "ffn_norm": self.ffn_norm}
        if sizes.d_model is not None or sizes.num_heads is not None:
            parts["attention"] = self.attention
        if sizes.d_model is not None or sizes.d_ff is not None:
            parts["ffn"] = self.ffn
        return grow_parts(sizes, **parts)

    def plain(self) -> PlainBlock:
        """The plain form of its layers. Raises NotPlain for those that have none."""
        return PlainBlock(
            **plain_parts(
                attention_norm=(self.attention_norm, PlainNorm),
                attention=(self.attention, PlainAttention),
                ffn_norm=(self.ffn_norm, PlainNorm),
                ffn=(self.ffn, (PlainFFN, PlainExperts)),
            )
        )

    def beyond_plain(self) -> Iterator[Beyond]:
        """Its attention and feed-forward, where they have no plain form."""
        return without_form(self, {"attention": PlainAttention, "ffn": PlainFFN})

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Head(nn.Linear):
    """The projection to logits: it reads the residual stream, whatever its size."""

    reads_stream = ("weight",)


class GPT(nn.Module):
    """Token embeddings, blocks, a final norm, and a projection to logits.

    With ``tie_embeddings`` the embedding matrix is the projection too, and ``head`` is None: one
    tensor under one name, for checkpoints and for models built on the meta device. With
    ``logits_soft_cap`` c, logits are c * tanh(logits / c) (Gemma 2, arXiv:2408.00118). ``ngram`` is
    added to the token embeddings, and ``embedding_norm`` normalises their sum before the blocks
    (Dettmers et al., arXiv:2110.02861).
    """

    takes_documents = True

    def __init__(
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
        ngram: NgramEmbedding | None = None,
        embedding_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.max_seq_len, self.dropout = d_model, max_seq_len, dropout
        self.logits_soft_cap = logits_soft_cap
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.position, self.ngram, self.embedding_norm = position, ngram, embedding_norm
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = final_norm
        self.head = None if tie_embeddings else Head(d_model, vocab_size, bias=False)

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator | None, *, num_layers: int
    ) -> bool:
        if name in ("embedding.weight", "head.weight"):
            normal_(tensor, embedding_std(self.d_model), generator)
        elif name == "final_norm.weight":
            tensor.fill_(LOGIT_GAIN)
        else:
            return False
        return True

    def create_caches(self, max_length: int) -> list[DecodingCache] | None:
        """A cache for each block, and one for the n-grams if there are any, for decoding up to
        ``max_length`` tokens; None if an attention has no cache."""
        caches: list[DecodingCache] = []
        for block in self.blocks:
            create = getattr(block.attention, "create_cache", None)
            cache = None if create is None else create(max_length)
            if cache is None:
                log.info("%s decodes without a cache", type(block.attention).__name__)
                return None
            caches.append(cache)
        if self.ngram is not None:
            caches.append(self.ngram.create_cache(max_length))
        return caches

    def forward(
        self,
        input_ids: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        caches: Sequence[DecodingCache] | None = None,
    ) -> ModelOutput:
        """input_ids int64 [B, T] to logits [B, T, V] and hidden [B, T, D].

        ``mask`` is boolean, or document ids [B, S]; see :mod:`apt_core.modeling.masks`. Raises
        ValueError for a sequence longer than ``max_seq_len``.
        """
        length, start = input_ids.shape[1], 0 if caches is None else caches[0].length
        if start + length > self.max_seq_len:
            raise ValueError(
                f"a sequence of {start + length} tokens is longer than model.max_seq_len "
                f"{self.max_seq_len}: shorten it or raise the setting"
            )
        x = self.embedding(input_ids)
        if positions is None and (start or self.position is not None):
            positions = torch.arange(start, start + length, device=input_ids.device)
        if self.ngram is not None:
            cache = None if caches is None else caches[-1]
            x = x + self.ngram(input_ids, positions=positions, cache=cache)
        if self.position is not None:
            x = x + self.position(positions)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        masks = self._masks(mask, len(input_ids), start + length, length)
        for index, block in enumerate(self.blocks):
            cache = None if caches is None else caches[index]
            x = block(x, mask=masks[index], positions=positions, cache=cache)
        hidden = self.final_norm(x)
        # A plugin may have replaced the head: it is called.
        logits = F.linear(hidden, self.output_weight) if self.head is None else self.head(hidden)
        return ModelOutput(self.capped(logits), hidden)

    def _masks(
        self, mask: Tensor | None, batch: int, total: int, length: int
    ) -> Sequence[Tensor | None]:
        """The mask of each block: document ids only where its attention takes them, and elsewhere
        one boolean mask, which all share."""
        if mask is None or not are_documents(mask):
            return [mask] * len(self.blocks)
        check_documents(mask, batch, total)
        taken = [takes_documents(getattr(block, "attention", block)) for block in self.blocks]
        dense = None if all(taken) else document_mask(mask, length)
        return [mask if takes else dense for takes in taken]

    @property
    def output_weight(self) -> Tensor:
        """The matrix [V, D] of the projection to logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    def capped(self, logits: Tensor) -> Tensor:
        """``logits`` with the soft cap, if there is one."""
        if self.logits_soft_cap is None:
            return logits
        return self.logits_soft_cap * torch.tanh(logits / self.logits_soft_cap)

    def grow(self, sizes: Sizes) -> dict[str, Larger]:
        """Take on larger ``sizes``. The rows of new ids are the mean of the others, so that their
        logits are the mean of the others' too. Raises CannotGrow with what cannot."""
        parts: dict[str, nn.Module | None] = {
            f"blocks.{number}": block for number, block in enumerate(self.blocks)
        }
        if sizes.d_model is not None:
            norms = {"final_norm": self.final_norm, "embedding_norm": self.embedding_norm}
            parts |= {**norms, "position": self.position, "ngram": self.ngram}
        reasons, grown = {}, {}
        try:
            grown = grow_parts(sizes, **parts)
        except CannotGrow as error:
            reasons = dict(error.reasons)
        if sizes.d_model is not None or sizes.vocab_size is not None:
            if not is_look_up(self.embedding):
                reasons["embedding"] = f"{type(self.embedding).__name__} is more than a look-up"
            if self.head is not None and not is_product(self.head):
                reasons["head"] = f"{type(self.head).__name__} is more than a product"
        if reasons:
            raise CannotGrow(reasons)
        ids, width = self.embedding.weight.shape
        ids, width = sizes.vocab_size or ids, sizes.d_model or width
        self.d_model, self.embedding.embedding_dim, self.embedding.num_embeddings = (
            width,
            width,
            ids,
        )
        self.embedding.weight = resized(self.embedding.weight, ids, width)
        grown["embedding.weight"] = Larger({0: "mean", 1: "zero"})
        if self.head is not None:
            resize_linear(self.head, ids, width)
            grown["head.weight"] = Larger({0: "mean", 1: "initial"})
        return grown

    def plain(self) -> PlainParts:
        """The tensors around the blocks; ``embedding_norm`` is applied to the embedding's rows,
        which unties them from the projection. Raises NotPlain for an embedding, a head or a final
        norm that others have changed."""
        reasons = {}
        if not is_look_up(self.embedding):
            reasons["embedding"] = f"{type(self.embedding).__name__} is more than a look-up"
        if self.head is not None and not is_product(self.head):
            reasons["head"] = f"{type(self.head).__name__} is more than a product with its weight"
        if reasons:
            raise NotPlain(reasons)
        embedding = self.embedding.weight
        head = None if self.head is None else self.head.weight
        if self.embedding_norm is not None:
            head, embedding = self.output_weight, self.embedding_norm(embedding)
        norm = plain_parts(final_norm=(self.final_norm, PlainNorm))["final_norm"]
        return PlainParts(embedding, list(self.blocks), norm, head, self.max_seq_len)

    def beyond_plain(self) -> Iterator[Beyond]:
        """What it has around the blocks beside the embedding and the projection."""
        if self.logits_soft_cap is not None:
            what = f"logits are capped softly at {self.logits_soft_cap:g}"
            yield Beyond("soft_cap", what, partial(setattr, self, "logits_soft_cap", None))
        if self.ngram is not None:
            what = "embeddings of n-grams are added to those of tokens"
            yield Beyond("ngram", what, partial(setattr, self, "ngram", None))
        if self.position is not None:
            yield Beyond("position", "embeddings of positions are added to those of tokens")

    def rows(self, products: Products) -> GPTRows | None:
        """The model for decoding rows of texts; None if a part of it takes no part in that, or
        waits for its calls by a hook."""
        if not takes_part(self, "rows"):
            return None
        if not (is_look_up(self.embedding) and (self.head is None or is_product(self.head))):
            return None
        blocks = []
        for block in self.blocks:
            made = block.rows(products) if hasattr(block, "rows") else None
            if made is None:
                return None
            blocks.append(made)
        return GPTRows(
            blocks,
            embedding=self.embedding.weight,
            ngram=self.ngram,
            position=self.position,
            embedding_norm=self.embedding_norm,
            final_norm=self.final_norm,
            output_weight=self.output_weight,
            capped=self.capped,
            products=products,
        )


def is_look_up(module: nn.Module) -> bool:
    """Whether ``module`` gives rows of its weight as they are, and no hook waits for it."""
    known = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
    return known and module.max_norm is None and takes_part(module, "forward")


def is_product(module: nn.Module) -> bool:
    """Whether ``module`` multiplies by its weight alone, and no hook waits for it."""
    known = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return known and module.bias is None and takes_part(module, "forward")


class GPTProvider(BackboneProvider):
    """``backbone:gpt``; it has no settings."""

    name = "gpt"

    def create_block(
        self, *, attention: nn.Module, ffn: nn.Module, norms: Sequence[nn.Module], dropout: float
    ) -> nn.Module:
        return Block(attention, ffn, norms, dropout)

    def create_model(self, **parts: Any) -> nn.Module:
        return GPT(**parts)
