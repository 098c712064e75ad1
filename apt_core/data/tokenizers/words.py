"""Splits text into words as `tokenizers` does, and keeps the ids of words."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator

PATTERN = (
    r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
"""Words: merges do not cross their borders. Each digit stands alone. (Other programs know the
pattern by the name of Qwen2.)"""

KEPT_WORDS = 1 << 17
LONGEST_KEPT = 64

PIECE = 1 << 20
"""Characters of a text that are split at once."""

# No word goes on over an end of line that visible ASCII follows.
_BORDER = re.compile(r"\n(?=[!-~])")


class WordEncoder:
    """Encodes text word by word: ``encode_word`` is called for new words alone, as most words of a
    text have been seen before. The ids are those of ``typecode`` (of :mod:`array`), as bytes.

    `tokenizers` takes over where a text has characters beyond the Basic Multilingual Plane
    (``encode_text``): classes of so many characters are slow in :mod:`re`.
    """

    def __init__(
        self,
        encode_word: Callable[[str], list[int]],
        encode_text: Callable[[str], list[int]],
        typecode: str,
    ) -> None:
        self._typecode = typecode
        self._encode_text = encode_text
        self._words = _Words(encode_word, typecode)
        self._split = compiled_pattern().findall

    def encode(self, text: str) -> bytes:
        """The ids of ``text``. Raises UnicodeEncodeError, a ValueError, for lone surrogates."""
        if len(text) <= PIECE:
            return self._encoded(text)
        return b"".join(map(self._encoded, pieces_of(text)))

    def _encoded(self, text: str) -> bytes:
        if not text.isascii() and len(text.encode("utf-16-le")) != 2 * len(text):
            return array(self._typecode, self._encode_text(text)).tobytes()
        return b"".join(map(self._words.__getitem__, self._split(text)))


class _Words(dict[str, bytes]):
    def __init__(self, encode: Callable[[str], list[int]], typecode: str) -> None:
        super().__init__()
        self._encode, self._typecode = encode, typecode

    def __missing__(self, word: str) -> bytes:
        found = array(self._typecode, self._encode(word)).tobytes()
        if len(word) <= LONGEST_KEPT:
            if len(self) >= KEPT_WORDS:
                self.clear()
            self[word] = found
        return found


def pieces_of(text: str, longest: int = PIECE) -> Iterator[str]:
    """``text`` in pieces between which words end, of about ``longest`` characters."""
    begin = 0
    while len(text) - begin > longest:
        border = _BORDER.search(text, begin + longest)
        if border is None:
            break
        yield text[begin : border.end()]
        begin = border.end()
    yield text[begin:]


def compiled_pattern() -> re.Pattern[str]:
    """PATTERN for :mod:`re`, which has no classes of Unicode's categories: these are asked of
    `tokenizers`, whose version of Unicode may be another one than Python's."""
    letters, numbers, spaces = map(_members, (r"\p{L}", r"\p{N}", r"\s"))
    parts = PATTERN.split("|")
    source = "|".join(
        re.sub(
            r"\[\^?[^\]]*\]|\\p\{L\}|\\p\{N\}|\\s|\\S",
            lambda found: _as_class(found[0], letters, numbers, spaces),
            part,
        )
        for part in parts
    )
    return re.compile(source)


def _as_class(part: str, letters: str, numbers: str, spaces: str) -> str:
    if part == r"\S":
        return f"[^{spaces}]"
    inside = part[1:-1] if part.startswith("[") else part
    for name, members in ((r"\p{L}", letters), (r"\p{N}", numbers), (r"\s", spaces)):
        inside = inside.replace(name, members)
    return f"[{inside}]"


def _members(category: str) -> str:
    """The characters of the Basic Multilingual Plane in a class, as ranges."""
    from tokenizers import Regex, pre_tokenizers

    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
    others = pre_tokenizers.Split(Regex(category + "+"), "removed").pre_tokenize_str(text)
    ranges, at = [], 0
    for begin, end in [*(where for _, where in others), (len(text), len(text))]:
        if begin > at:
            ranges.append(f"\\u{ord(text[at]):04x}-\\u{ord(text[begin - 1]):04x}")
        at = end
    return "".join(ranges)
