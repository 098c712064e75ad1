"""Tokenizes text to an array of ids, with a cache on disk, and hashes ids."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from apt_core.cache import cached_array
from apt_core.errors import ConfigError, Problem
from apt_core.log import get_logger
from apt_core.providers.tokenizer import TokenizerProvider, token_dtype

log = get_logger("apt.data")

Ids = npt.NDArray[Any]

CACHE_FROM = 8 << 20
"""The ids of texts with at least this many characters are cached, if the tokenizer has a
fingerprint."""

SAMPLE = 1 << 16
"""The number of first characters that are tokenised again to check cached ids."""

UNSURE = 64
"""The number of last ids of that sample that may differ because the text is cut."""

CHUNK = 1 << 20


def tokenize(tokenizer: TokenizerProvider, text: str, *, cache_from: int = CACHE_FROM) -> Ids:
    """The ids of ``text``, 1-D.

    Ids are kept on disk, and memory-mapped, for a text of ``cache_from`` characters or more and a
    tokenizer that tells by its ``fingerprint`` what they depend on. No name, version or settings
    stand for that: without a fingerprint the text is tokenised in every run.

    Raises ConfigError for what are no ids of the tokenizer's vocabulary.
    """
    tell = getattr(tokenizer, "fingerprint", None) if len(text) >= cache_from else None
    fingerprint = tell() if tell is not None else None
    if fingerprint is None:
        return _checked(tokenizer, tokenizer.encode_array(text))
    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    key = f"tokens/{kind}/{fingerprint}/{hashlib.sha256(text.encode('utf-8')).hexdigest()}"
    ids = cached_array(key, lambda: tokenizer.encode_array(text))
    if not _begin_alike(ids, tokenizer.encode_array(text[:SAMPLE])):
        log.warning(
            "tokenizer %s makes other ids than those kept under its fingerprint, which leaves "
            "something out: its text is tokenised anew",
            type(tokenizer).__name__,
        )
        ids = tokenizer.encode_array(text)
    return _checked(tokenizer, ids)


def ids_sha256(ids: Ids) -> str:
    """The sha256 of 1-D ``ids``, independent of their integer dtype."""
    dtype = token_dtype(int(ids.max()) + 1 if ids.size else 1).newbyteorder("<")
    digest = hashlib.sha256(f"{dtype.itemsize}:{ids.size}:".encode())
    for start in range(0, ids.size, CHUNK):
        digest.update(ids[start : start + CHUNK].astype(dtype, order="C", copy=False).data)
    return digest.hexdigest()


def _begin_alike(ids: Ids, sample: Ids) -> bool:
    sure = max(0, len(sample) - UNSURE)
    return np.array_equal(ids[:sure], sample[:sure])


def _checked(tokenizer: TokenizerProvider, ids: Ids) -> Ids:
    what = ""
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "ui":
        what = f"a {type(ids).__name__} that is no 1-D array of whole numbers"
    elif ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        what = f"ids from {ids.min()} to {ids.max()}, of a vocabulary of {tokenizer.vocab_size}"
    if what:
        message = f"the tokenizer ({type(tokenizer).__name__}) makes {what}"
        raise ConfigError(Problem(message, key="data.tokenizer_name"))
    return ids
