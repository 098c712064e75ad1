"""Byte-pair encoding, learned from the run's own text."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apt_core.data.tokenizers.base import CoreTokenizer, without_derived
from apt_core.data.tokenizers.words import PATTERN, WordEncoder
from apt_core.errors import ConfigError
from apt_core.files import write_atomically
from apt_core.json_files import read_json
from apt_core.providers.tokenizer import SPECIAL_NAMES, SpecialTokens, special_tokens, token_dtype

SMALLEST = 256 + len(SPECIAL_NAMES) + 1
"""All bytes, the special tokens, and one merge."""

FILE = "tokenizer.json"


class BPETokenizer(CoreTokenizer):
    """``tokenizer:bpe``. Pairs of bytes are merged within words (PATTERN), so that any text
    round-trips; digits stand alone. The special tokens come last.

    Training is that of the package `tokenizers`; :meth:`save` writes a folder that Hugging Face's
    ``AutoTokenizer`` reads too. Until it is trained it has no merges.
    """

    name = "bpe"
    version = "1.0.0"
    dependencies = ("tokenizers>=0.21",)
    trainable = True

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        size = self.settings.vocab_size
        if size is not None and size < SMALLEST:
            raise ConfigError(
                f"is {size}; byte-pair encoding needs {SMALLEST} ids or more",
                key="data.tokenizer.vocab_size",
            )
        self._vocab = {SYMBOLS[byte]: index for index, byte in enumerate(_IN_ORDER)}
        self._merges: list[list[str]] = []

    @property
    def vocab_size(self) -> int:
        return len(self._vocab) + len(SPECIAL_NAMES)

    @property
    def special(self) -> SpecialTokens:
        return special_tokens(range(len(self._vocab), self.vocab_size))

    def train(self, texts: Iterable[str]) -> None:
        tokenizers = _tokenizers()
        size = self.settings.vocab_size
        if size is None:
            raise ConfigError(
                "is not given", key="data.tokenizer.vocab_size", hint="say how many ids to make"
            )
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size - len(SPECIAL_NAMES),
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        made = self._backend({}, [])
        made.train_from_iterator(texts, trainer)
        # Its threads are used: processes forked from now on must not wait for them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._take(json.loads(made.to_str())["model"])

    def _take(self, model: Any) -> None:
        vocab, merges = model["vocab"], model["merges"]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        if sorted(vocab.values()) != list(range(len(vocab))) or not set(SYMBOLS) <= set(vocab):
            raise ValueError("the vocabulary is not that of all bytes and merges, without gaps")
        self._vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))
        self._merges = [list(pair) for pair in pairs]
        self.__dict__ = without_derived(self)

    def _backend(self, vocab: dict[str, int], merges: list[list[str]], pattern: bool = True) -> Any:
        tokenizers = _tokenizers()
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        pairs = [(left, right) for left, right in merges]
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=pairs))
        steps = [split, byte_level] if pattern else [byte_level]
        made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
        made.decoder = tokenizers.decoders.ByteLevel()
        return made

    @cached_property
    def _encoder(self) -> WordEncoder:
        word = self._backend(self._vocab, self._merges, pattern=False)
        text = self._backend(self._vocab, self._merges)
        return WordEncoder(
            lambda each: word.encode(each, add_special_tokens=False).ids,
            lambda each: text.encode(each, add_special_tokens=False).ids,
            token_dtype(self.vocab_size).char,
        )

    @cached_property
    def _texts(self) -> list[bytes]:
        """The bytes of each id."""
        byte_of = {symbol: byte for byte, symbol in enumerate(SYMBOLS)}
        texts = [bytes(byte_of[symbol] for symbol in token) for token in self._vocab]
        return texts + [b""] * len(SPECIAL_NAMES)

    def encode(self, text: str) -> list[int]:
        found: list[int] = self.encode_array(text).tolist()
        return found

    def encode_array(self, text: str) -> npt.NDArray[Any]:
        return np.frombuffer(self._encoder.encode(text), dtype=token_dtype(self.vocab_size))

    def decode(self, ids: Sequence[int]) -> str:
        texts = self._texts
        return b"".join([texts[int(token)] for token in ids]).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        super().save(folder)
        made = self._backend(self._vocab, self._merges)
        made.add_special_tokens(list(SPECIAL_NAMES))
        write_atomically(folder / FILE, made.to_str() + "\n")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIAL_NAMES[0],
            "pad_token": SPECIAL_NAMES[1],
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template,
        }
        write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")

    def load(self, folder: Path) -> None:
        path = folder / FILE
        try:
            self._take(read_json(path)["model"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} has no byte-pair model: {error}") from error
        super().load(folder)

    def fingerprint(self) -> str | None:
        # A subclass may encode in another way.
        if type(self) is not BPETokenizer:
            return None
        parts = [self.name, self.version, PATTERN, self.chat_template, *self._vocab]
        parts += chain.from_iterable(self._merges)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            "tokenizer bpe needs the package tokenizers",
            key="data.tokenizer_name",
            hint='pip install "apt-kernel[data]"',
        ) from error
    return tokenizers


def _symbols() -> list[str]:
    """The character by which byte-level vocabularies write each byte: itself where it is printable,
    else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256))
    return [chr(byte) if byte in printable else chr(256 + next(others)) for byte in range(256)]


SYMBOLS = _symbols()
"""By byte."""

_IN_ORDER = sorted(range(256), key=lambda byte: SYMBOLS[byte])
