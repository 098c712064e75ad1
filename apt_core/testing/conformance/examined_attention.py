"""An attention provider with the layers, inputs and calls of its checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from apt_core.modeling.masks import document_mask, document_positions, takes_documents
from apt_core.providers.attention import AttentionSupport
from apt_core.testing.conformance import layers, lengths
from apt_core.testing.conformance.checks import LeftOut, here
from apt_core.testing.conformance.layers import Call, sample
from apt_core.testing.conformance.places import MarkedPlaces

DOCUMENTS = [[0, 0, 0, 1, 1, 1, 1, 1], [4, 5, 5, 5, 5, 7, 7, 7]]
"""Two rows of eight tokens, each packed with documents."""


@dataclass(frozen=True)
class Attention:
    """An attention provider, and the layers that are checked: 4 heads of width 16."""

    provider: Any
    d_model: int = 64
    num_heads: int = 4
    length: int = 8

    @property
    def supports(self) -> AttentionSupport:
        return getattr(self.provider, "supports", AttentionSupport())

    def claims(self, flag: str) -> None:
        """Raise LeftOut if the provider says that its layers do not support ``flag``."""
        if not getattr(self.supports, flag):
            raise LeftOut(f"supports.{flag} is False")

    def create(self, **options: Any) -> nn.Module:
        options = {"max_seq_len": max(32, self.length), "position": MarkedPlaces(), **options}
        return self.provider.create_layer(self.d_model, self.num_heads, **options)

    def build(self, **options: Any) -> nn.Module:
        return layers.built(partial(self.create, **options))

    def input(self, batch: int = 2, length: int | None = None, seed: int = 0) -> torch.Tensor:
        return sample(batch, self.length if length is None else length, self.d_model, seed=seed)

    @cached_property
    def integers(self) -> dict[str, int]:
        """Integers that may be numbers of tokens."""
        other = replace(self, d_model=48, num_heads=2, length=40)
        return lengths.integers(self.provider, self.create, other.create)

    def places(self) -> list[int]:
        """The positions to check: all of a short text, or those near each integer in a longer
        one."""
        if self.length <= 8:
            return list(range(self.length))
        near = {n + d for n in self.integers.values() for d in (-1, 0, 1)}
        some = {0, 1, *sorted(n for n in near if 0 < n < self.length)[-9:]}
        return sorted({*some, self.length // 2, self.length - 2, self.length - 1})

    def calls_of(self, batch: int) -> list[Call]:
        """The forms in which training calls the layer with ``batch`` rows."""
        shape = batch, self.length
        found: list[Call] = [{}]
        if self.supports.mask:
            found.append({"mask": here(torch.ones(shape, dtype=torch.bool))[:, None, None]})
        if takes_documents(self.build()):
            found.append({"mask": here(torch.zeros(shape, dtype=torch.int64))})
        return found

    def at_lengths(self, check: Callable[[Attention], None]) -> None:
        """Run ``check`` on a short text and on one longer than any window of the settings."""
        check(self)
        longer = replace(self, length=lengths.longer(self.integers))
        try:
            check(longer)
        except (AssertionError, ValueError, RuntimeError, IndexError) as error:
            raise AssertionError(f"a text of {longer.length} tokens: {error}") from error

    def calls(self) -> list[Call]:
        """The forms in which training calls the layer."""
        documents = here(torch.tensor(DOCUMENTS))
        positions = document_positions(documents)
        found: list[Call] = [{}]
        if self.supports.mask:
            found.append({"mask": document_mask(documents), "positions": positions})
        if takes_documents(self.build()):
            found.append({"mask": documents, "positions": positions})
        return found
