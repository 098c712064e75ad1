"""The character tokenizer: one id a character of the run's text."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from apt_core.data.tokenizers.base import CoreTokenizer
from apt_core.files import write_atomically
from apt_core.json_files import read_json
from apt_core.providers.tokenizer import SPECIAL_NAMES, SpecialTokens, special_tokens

NUM_BYTES = 256
MAX_CHARACTERS = 65_000
"""Characters with an id of their own, where ``data.tokenizer.vocab_size`` does not say how many."""


class CharTokenizer(CoreTokenizer):
    """``tokenizer:char``. ASCII and the characters of the text it was trained on have an id each;
    every other one is its UTF-8 bytes, so that any text round-trips.

    Ids below 256 are bytes, then come the characters, most frequent ones first where there is no
    room for all, and the special tokens.
    """

    name = "char"
    version = "1.0.0"
    trainable = True

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._take("")

    @property
    def vocab_size(self) -> int:
        return NUM_BYTES + len(self.characters) + len(SPECIAL_NAMES)

    @property
    def special(self) -> SpecialTokens:
        return special_tokens(range(self.vocab_size - len(SPECIAL_NAMES), self.vocab_size))

    def train(self, texts: Iterable[str]) -> None:
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        size = self.settings.vocab_size
        room = MAX_CHARACTERS if size is None else size - NUM_BYTES - len(SPECIAL_NAMES)
        seen = (char for char in counts if char > "\x7f" and not "\ud800" <= char <= "\udfff")
        frequent = sorted(seen, key=lambda char: (-counts[char], char))[: max(0, room)]
        self._take("".join(sorted(frequent)))

    def _take(self, characters: str) -> None:
        self.characters = characters
        self._ids = {char: NUM_BYTES + index for index, char in enumerate(characters)}
        self._ids.update((chr(byte), byte) for byte in range(128))
        texts = [bytes([byte]) for byte in range(NUM_BYTES)]
        self._texts = [*texts, *(char.encode() for char in characters)]
        self._texts += [b""] * len(SPECIAL_NAMES)

    def encode(self, text: str) -> list[int]:
        ids = self._ids
        found: list[int] = []
        for char in text:
            token = ids.get(char)
            if token is None:
                found.extend(char.encode("utf-8"))
            else:
                found.append(token)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        texts = self._texts
        return b"".join([texts[int(token)] for token in ids]).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        super().save(folder)
        text = json.dumps({"version": 1, "characters": self.characters}, ensure_ascii=False)
        write_atomically(folder / "characters.json", text + "\n")

    def load(self, folder: Path) -> None:
        path = folder / "characters.json"
        kept = read_json(path)
        characters = kept.get("characters") if isinstance(kept, dict) else None
        if not isinstance(characters, str) or len(set(characters)) != len(characters):
            raise ValueError(f"{path} is no list of characters")
        self._take(characters)
        super().load(folder)

    def fingerprint(self) -> str | None:
        if type(self) is not CharTokenizer:
            return None
        parts = [self.name, self.version, self.chat_template, self.characters]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()
