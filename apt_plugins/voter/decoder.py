"""Chooses a next token that the model is uncertain of by the majority of several draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apt_core import GenerationRequest
from apt_core.inference import candidates
from apt_core.modeling import generator_for


class VotingDecoder:
    """Puts a token to the vote where the entropy of softmax(logits / temperature) over all token
    ids reaches ``threshold``: in nats, or with ``normalized`` as a share of ln V.

    Each of ``k`` voters draws a token as plain sampling does, from a generator of their own that is
    a function of (the request's seed, the number of the token): a vote depends on nothing that was
    drawn before it, and moves no other draw. Most votes win; of as many, the more probable token.
    ``tokens`` counts what was looked at, ``votes`` what was voted on. The request's temperature is
    above 0.
    """

    def __init__(
        self, request: GenerationRequest, *, threshold: float, k: int, normalized: bool
    ) -> None:
        self._request, self._threshold, self._k = request, threshold, k
        self._normalized = normalized
        self.tokens = self.votes = 0

    def choose(self, input_ids: Tensor, logits: Tensor) -> int | None:
        """The winner given ``logits`` [V], or None where the model is certain enough."""
        position = self.tokens
        self.tokens += 1
        threshold = self._threshold * (math.log(logits.numel()) if self._normalized else 1.0)
        if entropy(logits / self._request.temperature) < threshold:
            return None
        self.votes += 1
        # On the CPU, where a seed draws the same on every machine.
        probabilities, ids = candidates(logits.cpu(), self._request)
        generator = generator_for(self._request.seed, f"voter/{position}")
        drawn = torch.multinomial(probabilities, self._k, replacement=True, generator=generator)
        # Candidates come in the order of their probability, and the first of the largest wins.
        return int(ids[drawn.bincount().argmax()])


def entropy(logits: Tensor) -> float:
    """The entropy of softmax(logits) in nats; ids with a logit of -inf take no part."""
    return float(torch.special.entr(logits.softmax(-1)).sum())
