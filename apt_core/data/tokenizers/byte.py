"""The byte tokenizer: 256 ids, one a byte of UTF-8."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from apt_core.data.tokenizers.base import CoreTokenizer
from apt_core.providers.tokenizer import SPECIAL_NAMES, SpecialTokens, special_tokens

SPECIAL_BYTES = tuple(range(0xFF, 0xFF - len(SPECIAL_NAMES), -1))
"""Values that no byte of UTF-8 has; the special tokens of SPECIAL_NAMES, in that order."""


class ByteTokenizer(CoreTokenizer):
    """``tokenizer:byte``. Every text is its UTF-8 bytes; special tokens are values that UTF-8 does
    not use.

    >>> ByteTokenizer().encode("hé")
    [104, 195, 169]
    """

    name = "byte"
    version = "1.1.0"

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def special(self) -> SpecialTokens:
        return special_tokens(SPECIAL_BYTES)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_array(self, text: str) -> npt.NDArray[Any]:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        data = bytes(int(token) for token in ids).translate(None, bytes(SPECIAL_BYTES))
        return data.decode("utf-8", errors="replace")

    def fingerprint(self) -> str | None:
        # A subclass may encode in another way.
        if type(self) is not ByteTokenizer:
            return None
        parts = [self.name, self.version, self.chat_template]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()
