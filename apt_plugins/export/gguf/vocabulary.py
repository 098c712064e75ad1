"""A tokenizer.json as the vocabulary of a GGUF."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens: control tokens are found in a text where a program asks for it, user-defined
ones in any text, both before anything else; a byte stands for itself where no other token does."""


@dataclass(frozen=True)
class Vocabulary:
    """What ``tokenizer.ggml`` has: ``tokens`` and their ``types``, by id.

    The ``model`` ``gpt2`` merges bytes by its ``merges``, pairs joined by a space, in words that
    the pattern called ``pre`` splits. ``llama`` merges characters of a whole text, before which it
    puts a space if ``space_prefix``, to the token with the highest of ``scores``.
    """

    model: str
    tokens: list[str]
    types: list[int]
    merges: Sequence[str] = ()
    pre: str = "default"
    scores: Sequence[float] = ()
    space_prefix: bool = False


@dataclass
class Reading:
    """A tokenizer.json with byte-pair encoding, and the ``problems`` that were found in it: what
    llama.cpp has no equal for."""

    data: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)

    @property
    def model(self) -> Mapping[str, Any]:
        return self.data.get("model") or {}

    @property
    def merges(self) -> list[tuple[str, str]]:
        pairs = [
            pair.split(" ", 1) if isinstance(pair, str) else pair
            for pair in self.model.get("merges", ())
        ]
        return [(left, right) for left, right in pairs]

    def refuse(self, what: str) -> None:
        self.problems.append(f"the tokenizer {what}")

    def placed(self, rows: int) -> tuple[list[str], list[int]]:
        """The texts and types of ``rows`` ids."""
        by_id: dict[int, tuple[str, int]] = {
            token: (text, NORMAL) for text, token in self.model.get("vocab", {}).items()
        }
        for added in self.data.get("added_tokens") or ():
            for option in ("lstrip", "rstrip", "single_word"):
                if added.get(option):
                    self.refuse(f"finds {added['content']!r} by {option}, which no GGUF can say")
            kind = CONTROL if added.get("special") else USER_DEFINED
            by_id[added["id"]] = (added["content"], kind)
        if max(by_id, default=0) >= rows:
            self.refuse(f"has the id {max(by_id)}, and the model {rows} ids")
        filled = [by_id.get(token, (f"[unused{token}]", UNUSED)) for token in range(rows)]
        texts = [text for text, _ in filled]
        twice = [text for text, times in Counter(texts).items() if times > 1]
        if twice:
            self.refuse(f"has the token {twice[0]!r} twice")
        return texts, [kind for _, kind in filled]


def typed(part: Any) -> str:
    """The type of a part of a tokenizer.json, for a message."""
    return str(part.get("type")) if isinstance(part, Mapping) else "nothing"
