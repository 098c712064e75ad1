"""The default backbone for decoding rows of texts: see :mod:`apt_core.modeling.row_decoding`.

Shapes: B rows, T new tokens a row, N = B*T, S the places that a cache has room for, D d_model,
K key and value heads, R the width at which a head attends, V token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.compiled_rows import CompiledToken, Compiler, Part
from apt_core.modeling.layers.attention_rows import AttentionRows
from apt_core.modeling.layers.ngram import NgramEmbedding
from apt_core.modeling.row_decoding import (
    CalledAsEver,
    Function,
    Products,
    Rows,
    RowStep,
    call_as_ever,
    function_of,
    likeliest,
)

MOST_TOGETHER = 16
"""Blocks that are compiled into one function at most; of a deeper model each is one of its own.
Measured with 6, 12 and 13 blocks (1 M, 14 M and 60 M parameters), a token by functions of one block
takes 1.4, 1.12 and 1.04 of the time. Compiling takes 14, 23 and 32 seconds, and 62 with 30 blocks;
block by block 16 with 13 blocks, and 29 with 30."""


@dataclass(frozen=True)
class BlockRows:
    """A pre-norm block for decoding rows: the functions of its parts."""

    attention_norm: Function
    attention: Rows
    ffn_norm: Function
    ffn: Function

    def __call__(self, x: Tensor, step: RowStep) -> Tensor:
        """x [N, D] to [N, D]."""
        return self.after_attention(x + self.attention(self.attention_norm(x), step))

    def after_attention(self, x: Tensor) -> Tensor:
        """x [N, D] with what the feed-forward adds."""
        return x + self.ffn(self.ffn_norm(x))

    @property
    def compiled_attention(self) -> AttentionRows | None:
        """Its attention if that and the norm before it can be compiled."""
        attention = self.attention
        if not isinstance(attention, AttentionRows) or not attention.compilable:
            return None
        return None if isinstance(self.attention_norm, CalledAsEver) else attention

    @property
    def compiles_whole(self) -> bool:
        """Whether all of it can be compiled."""
        ffn = self.ffn_norm, self.ffn
        return self.compiled_attention is not None and not any(
            isinstance(each, CalledAsEver) for each in ffn
        )


class CompiledBlocks:
    """A :data:`Part` of consecutive ``blocks``, one compiled function: x [1, D] to x, or to what
    ``read_out`` gives of it. With ``embedded`` it begins with that. The feed-forward of the last
    block is left out and called as ever where it cannot be compiled."""

    def __init__(
        self,
        blocks: Sequence[BlockRows],
        compiler: Compiler,
        *,
        embedded: Callable[[Tensor, RowStep], Tensor] | None,
        read_out: Callable[[Tensor], tuple[Tensor, ...]] | None,
    ) -> None:
        self._attentions = [each for b in blocks if (each := b.compiled_attention) is not None]
        self._rest = None if blocks[-1].compiles_whole else blocks[-1].after_attention
        self._embeds = embedded is not None

        def of_token(numbers: Tensor, places: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            step = RowStep(numbers[1:], first=0, span=1, mask=False, last=0)
            unseen = torch.zeros_like(places, dtype=torch.float32)
            unseen = unseen.masked_fill(places > numbers[1], float("-inf"))
            if embedded is None:
                x, *held = given
            else:
                x, held = embedded(numbers[:1], step), list(given)
            for block, attention, cache in zip(blocks, self._attentions, held, strict=True):
                x = x + attention.by_one(block.attention_norm(x), step, cache, unseen)
                x = block.after_attention(x) if block.compiles_whole else x
            return (x,) if read_out is None else read_out(x)

        x, numbers = self._attentions[0].example, torch.zeros(2, 1, dtype=torch.int64)
        given = self._given(x, numbers, RowStep.example())
        # The room of caches varies.
        varying = {1: 0, **{len(given) - 1 - n: 1 for n in range(len(blocks))}}
        self._run = compiler.compiled(of_token, *given, varying=varying)

    def __call__(self, x: Tensor, numbers: Tensor, step: RowStep) -> Sequence[Tensor]:
        found = self._run(*self._given(x, numbers, step))
        return found if self._rest is None else (self._rest(found[0]),)

    def _given(self, x: Tensor, numbers: Tensor, step: RowStep) -> list[Tensor]:
        held = [attention.slot(step) for attention in self._attentions]
        before = () if self._embeds else (x,)
        return [numbers, step.all_places(held[0].shape[1]), *before, *held]


class GPTRows:
    """A GPT for decoding rows; ``reach`` is how many ids before a token it asks for."""

    def __init__(
        self,
        blocks: Sequence[BlockRows],
        *,
        embedding: Tensor,
        ngram: NgramEmbedding | None,
        position: nn.Module | None,
        embedding_norm: nn.Module | None,
        final_norm: nn.Module,
        output_weight: Tensor,
        capped: Function,
        products: Products,
    ) -> None:
        self._blocks, self._embedding, self._capped = blocks, embedding, capped
        self._ngram, self._position = ngram, position
        self.caches = [block.attention.cache for block in blocks]
        self.reach = 0 if ngram is None else ngram.reach
        self._embedding_norm: Function | None = None
        if embedding_norm is not None:
            self._embedding_norm = function_of(embedding_norm, products)
        self._final_norm = function_of(final_norm, products)
        self._project = products.of(output_weight)

    def hidden(self, input_ids: Tensor, step: RowStep) -> Tensor:
        """The states [N, D] before the final norm of the new tokens int64 [B, T] of a step."""
        x = self._embedded(input_ids, step)
        for block in self._blocks:
            x = block(x, step)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [n, V] of states [n, D] of :meth:`hidden`."""
        return self._capped(self._project(self._final_norm(hidden)))

    def compiled(self, compiler: Compiler, vocab_size: int) -> CompiledToken | None:
        """What computes one token with as few compiled functions as possible, and the logits of the
        first ``vocab_size`` ids after it; None if no block can be compiled. Raises what
        ``compiler`` raises."""
        groups: list[list[BlockRows]] = []
        together = len(self._blocks) <= MOST_TOGETHER
        for block in self._blocks:
            goes_on = together and bool(groups) and groups[-1][-1].compiles_whole
            if goes_on and block.compiled_attention is not None:
                groups[-1].append(block)
            else:
                groups.append([block])
        if all(group[0].compiled_attention is None for group in groups):
            return None

        def read_out(hidden: Tensor) -> tuple[Tensor, ...]:
            logits = self.logits(hidden)[:, :vocab_size]
            return logits, likeliest(logits)

        embeds = self._embeds_compiled and groups[0][0].compiled_attention is not None
        reads = groups[-1][-1].compiles_whole and not isinstance(self._final_norm, CalledAsEver)
        parts: list[Part] = []
        if not embeds:
            parts.append(lambda numbers, _, step: (self._embedded(numbers[:1], step),))
        for group in groups:
            if group[0].compiled_attention is None:
                parts.append(partial(_uncompiled, group[0]))
                continue
            begins, ends = embeds and group is groups[0], reads and group is groups[-1]
            parts.append(
                CompiledBlocks(
                    group,
                    compiler,
                    embedded=self._embedded if begins else None,
                    read_out=read_out if ends else None,
                )
            )
        if not reads:
            parts.append(lambda x, numbers, step: read_out(x))
        number = sum(block.compiled_attention is not None for block in self._blocks)
        return CompiledToken(parts, number)

    @property
    def _embeds_compiled(self) -> bool:
        plain = self._ngram is None and self._position is None
        return plain and not isinstance(self._embedding_norm, CalledAsEver)

    def _embedded(self, input_ids: Tensor, step: RowStep) -> Tensor:
        """int64 [B, T] to [N, D]."""
        x = F.embedding(input_ids, self._embedding)
        if self._ngram is not None:
            x = x + self._ngram(input_ids, positions=step.positions, cache=_Context(step))
        if self._position is not None:
            x = x + call_as_ever(self._position, step.positions)
        x = x.flatten(0, 1)
        return x if self._embedding_norm is None else self._embedding_norm(x)


@torch.inference_mode()
def _uncompiled(block: BlockRows, x: Tensor, numbers: Tensor, step: RowStep) -> tuple[Tensor]:
    return (block(x, step),)


class _Context:
    """The ids before those of a step, in the place of a cache of n-grams."""

    def __init__(self, step: RowStep) -> None:
        self._step = step

    def append(self, symbols: Tensor) -> Tensor:
        """The ids [B, reach + T], of which ``symbols`` are the last T, as symbols."""
        assert self._step.context is not None
        return self._step.context
