"""From text to an array of token ids, kept on disk where that saves work."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy.typing as npt

from apt_core.cache import cached_array
from apt_core.providers.tokenizer import TokenizerProvider

CACHE_FROM = 8 << 20
"""Texts of so many characters and more are tokenised once and then read from the cache."""


def tokenize(
    tokenizer: TokenizerProvider, text: str, *, cache_from: int = CACHE_FROM
) -> npt.NDArray[Any]:
    """The ids of ``text``, 1-D and unsigned; from ``cache_from`` characters on, memory-mapped."""
    if len(text) < cache_from:
        return tokenizer.encode_array(text)
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    settings = repr(tokenizer.config) if tokenizer.config is not None else ""
    key = f"tokens/{tokenizer.get_name()}/{tokenizer.get_version()}/{settings}/{digest}"
    return cached_array(key, lambda: tokenizer.encode_array(text))
