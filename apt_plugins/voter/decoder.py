"""Chooses an uncertain next token by the majority of several draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apt_core import GenerationRequest
from apt_core.inference import candidates
from apt_core.modeling import generator_for


class VotingDecoder:
    """Votes on a token where the entropy of softmax(logits / temperature), over all token ids,
    reaches ``threshold``: in nats, or with ``normalized`` as a share of ln V.

    Each of ``k`` voters draws a token as plain sampling does. The generator is seeded by (the
    request's seed, the number of the token): a vote depends on no earlier draw, and changes none.
    The token with the most votes wins; a tie goes to the more probable token. ``tokens`` counts the
    tokens seen, ``votes`` those voted on. The request's temperature must be above 0.
    """

    def __init__(
        self, request: GenerationRequest, *, threshold: float, k: int, normalized: bool
    ) -> None:
        self._request, self._threshold, self._k = request, threshold, k
        self._normalized = normalized
        self.tokens = self.votes = 0

    def choose(self, input_ids: Tensor, logits: Tensor) -> int | None:
        """The winner given ``logits`` [V]; None where the entropy is below the threshold."""
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
        # Candidates are sorted by probability, and argmax takes the first of equal counts.
        return int(ids[drawn.bincount().argmax()])


def entropy(logits: Tensor) -> float:
    """The entropy of softmax(logits) in nats; ids with a logit of -inf add nothing."""
    return float(torch.special.entr(logits.softmax(-1)).sum())
