"""Look-up decoding: guesses the next tokens from what the text has said before.

The guesses are computed in one forward and those that the model would have chosen are kept (Saxena
2023, "prompt lookup decoding"; Leviathan et al. 2023, arXiv:2211.17192): a text that repeats itself
takes fewer steps, and no token of it changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Lookup = Literal["auto", "always", "never"]
LOOKUPS = ("auto", "always", "never")

ORDERS = (6, 3)
"""The numbers of last tokens that are looked for, one after the other."""

LONGEST = 8
"""Tokens that are guessed at most."""

TIE = 1e-3
"""If the most likely token's logit is less than this above the next one's, the token is computed
again alone: logits of several tokens computed together differ in their last bits."""

PAYS = 1.05
"""Look-up goes on while it makes text this much faster than steps of one token do."""

TRIAL = 8
"""Steps after which it is judged whether look-up pays."""

PAUSE = 64
"""Steps without look-up after it did not pay, before it is tried again."""


class Guesses:
    """Where the text has had its last tokens before, and what came then."""

    def __init__(self) -> None:
        self._places: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in ORDERS)
        self._known = 0

    def of(self, ids: Sequence[int], most: int) -> list[int]:
        """The next tokens, at most ``most``, as a guess; ``ids`` has grown since the last call."""
        for places, order in zip(self._places, ORDERS, strict=True):
            # Not the last ones, of which it is not known what comes then.
            for end in range(max(order, self._known), len(ids)):
                places[tuple(ids[end - order : end])] = end
        self._known = len(ids)
        for places, order in zip(self._places, ORDERS, strict=True):
            if len(ids) < order:
                continue
            place = places.get(tuple(ids[-order:]))
            if place is not None:
                return _continued(ids, place, min(most, LONGEST))
        return []


def _continued(ids: Sequence[int], place: int, length: int) -> list[int]:
    """``length`` tokens from ``place`` on; beyond the end, the text goes on as it did from there.

    >>> _continued([7, 1, 2, 1, 2], 3, 5)
    [1, 2, 1, 2, 1]
    """
    period = ids[place:]
    return [period[index % len(period)] for index in range(length)]


class Payoff:
    """Whether look-up pays, by the seconds of steps with and without it and the tokens they gave.

    ``plain`` and ``guessed`` are sums of (seconds, tokens) of late steps.
    """

    def __init__(self, mode: Lookup) -> None:
        self._mode, self._pause = mode, 0
        self._plain = self._guessed = (0.0, 0.0)
        self._trials = 0
        self.steps = self.guessed_tokens = self.kept_tokens = 0

    @property
    def wanted(self) -> bool:
        """Whether the next step is to guess."""
        # A plain step first, to compare with.
        return self._mode == "always" or (
            self._mode == "auto" and not self._pause and self._plain[1] > 0
        )

    def plain_step(self, seconds: float, tokens: int) -> None:
        """Count a step of one token for each text."""
        self._plain = _added(self._plain, seconds, tokens)
        self._pause = max(0, self._pause - 1)

    def guessed_step(self, seconds: float, tokens: int, *, guessed: int, kept: int) -> None:
        """Count a step that gave ``tokens``, ``kept`` of which had been ``guessed``."""
        self._guessed = _added(self._guessed, seconds, tokens)
        self.steps, self._trials = self.steps + 1, self._trials + 1
        self.guessed_tokens += guessed
        self.kept_tokens += kept
        if self._trials >= TRIAL and self._mode == "auto":
            self._trials = 0
            if self._speed(self._guessed) < PAYS * self._speed(self._plain):
                self._pause, self._guessed = PAUSE, (0.0, 0.0)

    @staticmethod
    def _speed(sums: tuple[float, float]) -> float:
        return sums[1] / sums[0] if sums[0] else 0.0


def _added(sums: tuple[float, float], seconds: float, tokens: int) -> tuple[float, float]:
    """The sums with a step more, in which old steps fade away."""
    return 0.9 * sums[0] + seconds, 0.9 * sums[1] + tokens
