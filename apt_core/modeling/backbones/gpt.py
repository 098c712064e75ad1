"""The default backbone: a pre-norm decoder-only transformer (``backbone:gpt``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.log import get_logger
from apt_core.modeling.init import embedding_std, normal_
from apt_core.modeling.layers.ngram import NgramEmbedding
from apt_core.providers.attention import DecodingCache
from apt_core.providers.backbone import BackboneProvider
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

        Raises ValueError for a sequence longer than ``max_seq_len``.
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
        for index, block in enumerate(self.blocks):
            cache = None if caches is None else caches[index]
            x = block(x, mask=mask, positions=positions, cache=cache)
        hidden = self.final_norm(x)
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = F.linear(hidden, weight)
        if self.logits_soft_cap is not None:
            logits = self.logits_soft_cap * torch.tanh(logits / self.logits_soft_cap)
        return ModelOutput(logits, hidden)


class GPTProvider(BackboneProvider):
    """``backbone:gpt``; it has no settings."""

    name = "gpt"

    def create_block(
        self, *, attention: nn.Module, ffn: nn.Module, norms: Sequence[nn.Module], dropout: float
    ) -> nn.Module:
        return Block(attention, ffn, norms, dropout)

    def create_model(self, **parts: Any) -> nn.Module:
        return GPT(**parts)
