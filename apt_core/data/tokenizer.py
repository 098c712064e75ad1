"""The byte tokenizer: 256 ids, one a byte of UTF-8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from apt_core.providers.tokenizer import TokenizerProvider


class ByteTokenizer(TokenizerProvider):
    """``tokenizer:byte``; it has no settings. Every text is its UTF-8 bytes.

    >>> ByteTokenizer().encode("hé")
    [104, 195, 169]
    """

    name = "byte"
    version = "1.0.0"

    @property
    def vocab_size(self) -> int:
        return 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_array(self, text: str) -> npt.NDArray[Any]:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(token) for token in ids).decode("utf-8", errors="replace")
