"""The text of a growing list of tokens, in whole characters and up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from apt_core.providers.tokenizer import TokenizerProvider

UNDECODED = "\ufffd"
"""What a tokenizer makes of bytes that are no character, or not yet."""

WINDOW = 48
"""Tokens that are decoded together. A tokenizer may make a token's text depend on its neighbours,
so the window's first half is decoded again with what follows."""


def whole_characters(text: str) -> str:
    """``text``, which may have been cut anywhere, without the beginning of a character at its end.

    >>> whole_characters("水火".encode()[:5].decode(errors="replace"))
    '水'
    """
    return text.removesuffix(UNDECODED)


class GrowingText:
    """The text of tokens that are added one by one, cut before the first of ``stops``.

    What :meth:`add` returns, and in the end :meth:`finish`, is the text in pieces: a piece splits
    no character and holds no part of a stop string.
    """

    def __init__(self, tokenizer: TokenizerProvider, stops: Sequence[str] = ()) -> None:
        self._decode = tokenizer.decode
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._ids: list[int] = []
        self._first = 0  # the window's first token
        self._split = 0  # the token before which the next window may begin
        self._known = 0  # characters of the window's text that are in _text already
        self._text = ""
        self._given = 0  # characters of _text that were returned
        self._searched = 0  # no stop string begins before this character
        self.stopped = False

    @property
    def text(self) -> str:
        """The text so far; once it has ended, all of it."""
        return self._text

    def add(self, token: int) -> str:
        """What can be told of the text since the last piece; sets ``stopped`` at a stop string."""
        self._ids.append(token)
        window = self._decode(self._ids[self._first :])
        whole = not window.endswith(UNDECODED)
        # Only the last character can still change.
        self._take(window if whole else window[:-1])
        if whole and len(self._ids) - self._first >= WINDOW:
            self._move()
        return self._piece()

    def finish(self, *, cut: bool = False) -> str:
        """The last piece; of a text that is ``cut``, see :func:`whole_characters`."""
        if not self.stopped:
            window = self._decode(self._ids[self._first :])
            self._take(whole_characters(window) if cut else window)
        piece, self._given = self._text[self._given :], len(self._text)
        return piece

    def _take(self, settled: str) -> None:
        """Add what is new in the text of the window, as far as it is ``settled``."""
        self._text += settled[self._known :]
        self._known = max(self._known, len(settled))
        if self._stops and not self.stopped:
            self._search()

    def _move(self) -> None:
        self._first = self._split or len(self._ids) - WINDOW // 2
        self._split = len(self._ids)
        self._known = len(self._decode(self._ids[self._first :]))

    def _search(self) -> None:
        places = [self._text.find(stop, self._searched) for stop in self._stops]
        found = [place for place in places if place >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True
        else:
            self._searched = max(0, len(self._text) - self._longest + 1)

    def _piece(self) -> str:
        end = len(self._text) if self.stopped else len(self._text) - self._held_back()
        piece, self._given = self._text[self._given : end], max(self._given, end)
        return piece

    def _held_back(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        for length in range(min(self._longest - 1, len(self._text)), 0, -1):
            end = self._text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
