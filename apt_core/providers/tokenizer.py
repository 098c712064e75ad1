"""Providers of tokenizers (kind ``tokenizer``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from apt_core.providers.base import Provider

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class TokenizerProvider(Provider, ABC):
    """Turns text into ids and back; the provider is the tokenizer itself.

    ``decode(encode(text)) == text`` for every text. Padding is not a token: the loss mask tells it.
    Special tokens, where a tokenizer has them, are ids after those of the text.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """How many ids there are; ids run from 0 to ``vocab_size - 1``."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of ``text``. Raises ValueError for lone surrogates, which are not text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; what is no valid text becomes U+FFFD. Never raises for valid ids."""

    def encode_array(self, text: str) -> npt.NDArray[Any]:
        """The ids of ``text`` as a 1-D array of the smallest unsigned type that holds them."""
        import numpy as np

        return np.array(self.encode(text), dtype=token_dtype(self.vocab_size))

    def fingerprint(self) -> str | None:
        """A hash of everything that decides which ids a text has: the vocabulary's content, every
        setting that matters, the code. None, the default, where that cannot be told.

        Two tokenizers with one fingerprint make the same ids of every text. The ids of long texts
        are kept on disk under it, and taken from there in later runs; without one each run
        tokenises its text anew. A name or a version is no fingerprint.
        """
        return None


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint8, uint16 and uint32 that holds ids below ``vocab_size``."""
    import numpy as np

    return np.dtype(
        np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32
    )
