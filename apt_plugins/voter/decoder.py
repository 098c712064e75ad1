"""Chooses uncertain next tokens by a vote of several draws or continuations."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from apt_core import GenerationRequest
from apt_core.evaluation.final_answers import final_answer
from apt_core.inference import Branch, Branches, candidates
from apt_core.modeling import generator_for
from apt_plugins.voter.ballot import confidence, majority, medoid, weights
from apt_plugins.voter.settings import VotingSettings


class VotingDecoder:
    """Votes on a token where the entropy of softmax(logits / temperature), over all token ids,
    reaches ``threshold``: in nats, or with ``normalized`` as a share of ln V.

    Each of ``k`` voters continues the text by ``length`` tokens, drawn as plain sampling draws
    them, and all tokens of the winner are taken: were its first one taken alone, the next draws
    could come to another answer than the one that won. The draws are seeded by (the request's seed,
    the number of the token): a vote depends on no earlier draw, and changes none.

    A single token wins by the weight of its voters; a tie goes to the more probable one. With a
    ``window`` that many continuations are drawn at a time, until those of one window all agree, and
    all that were drawn by then are counted. ``tokens`` counts the tokens of the text, ``votes``
    the votes, ``computed`` the tokens that continuations took, which is the price of the votes.
    The request's temperature must be above 0.
    """

    def __init__(
        self,
        request: GenerationRequest,
        settings: VotingSettings,
        *,
        threshold: float | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        """``threshold`` takes the place of that of ``settings``; ``decode`` makes a text of tokens,
        which answers are looked for in."""
        self.request, self.settings = request, settings
        self.threshold = settings.threshold if threshold is None else threshold
        self._decode = decode
        self._taken: deque[int] = deque()
        self.tokens = self.votes = self.computed = 0

    def choose(
        self, input_ids: Tensor, logits: Tensor, branches: Branches | None = None
    ) -> int | None:
        """The winner given ``logits`` [V]; None where the entropy is below the threshold. Longer
        continuations than one token are made by ``branches``."""
        position = self.tokens
        self.tokens += 1
        if self._taken:
            return self._taken.popleft()
        full = math.log(logits.numel()) if self.settings.normalized else 1.0
        if entropy(logits / self.request.temperature) < self.threshold * full:
            return None
        self.votes += 1
        if self.settings.length == 1 or branches is None:
            return self._token(position, logits)
        before = branches.tokens
        try:
            winner = self._continuation(position, logits, branches)
        finally:
            self.computed += branches.tokens - before
        self._taken.extend(winner.token_ids)
        return self._taken.popleft()

    def _token(self, position: int, logits: Tensor) -> int:
        """The winner of votes for single tokens."""
        # On the CPU, where a seed draws the same on every machine.
        probabilities, ids = candidates(logits.cpu(), self.request)
        generator = generator_for(self.request.seed, f"voter/{position}")
        k, temperature = self.settings.k, self.settings.weight_temperature
        drawn = torch.multinomial(probabilities, k, replacement=True, generator=generator)
        votes = drawn.bincount()
        if temperature is not None:
            surest = logits.cpu().log_softmax(-1)[ids[: len(votes)]].double()
            votes = votes * ((surest - surest[votes > 0].max()) / temperature).exp().nan_to_num(0)
        # Candidates are sorted by probability, and argmax takes the first of equal votes.
        return int(ids[votes.argmax()])

    def _continuation(self, position: int, logits: Tensor, branches: Branches) -> Branch:
        """The winner of votes for continuations."""
        settings = self.settings
        generator = generator_for(self.request.seed, f"voter/{position}")
        seeds = torch.randint(2**62, (settings.k,), generator=generator).tolist()
        size = settings.window or settings.k
        found: list[Branch] = []
        while len(found) < settings.k:
            window = branches(logits, settings.length, seeds[len(found) : len(found) + size])
            found += window
            if len(window) == size and len({self._answer(branch) for branch in window}) == 1:
                break
        weight_of = weights([confidence(each) for each in found], settings.weight_temperature)
        if settings.winner == "medoid":
            return found[medoid(found, weight_of)]
        return found[majority(found, weight_of, self._answer)]

    def _answer(self, branch: Branch) -> str | tuple[int, ...]:
        """By what two voters agree: all tokens, or the final answer of their text."""
        if self.settings.winner == "medoid" or self._decode is None:
            return branch.token_ids
        return final_answer(self._decode(branch.text_ids))


def entropy(logits: Tensor) -> float:
    """The entropy of softmax(logits) in nats; ids with a logit of -inf add nothing."""
    return float(torch.special.entr(logits.softmax(-1)).sum())
