"""A store in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apt_core.data.store.parts import ArrayPart
from apt_core.data.tokens import ids_sha256, tokenize
from apt_core.providers.dataset import DatasetProvider
from apt_core.providers.tokenizer import TokenizerProvider


@dataclass(frozen=True)
class MemoryStore:
    parts: dict[str, ArrayPart]
    description: str
    sha256: str
    tokens_sha256: dict[str, str]

    def part(self, name: str) -> ArrayPart:
        return self.parts[name]


def in_memory(source: DatasetProvider, tokenizer: TokenizerProvider) -> MemoryStore:
    text = source.load()
    parts: dict[str, Any] = {"train": text.train, "val": text.val}
    ids = {name: tokenize(tokenizer, each) for name, each in parts.items()}
    return MemoryStore(
        {n: ArrayPart(ids[n], num_bytes=len(parts[n].encode())) for n in parts},
        text.description,
        text.sha256,
        {n: ids_sha256(each) for n, each in ids.items()},
    )
