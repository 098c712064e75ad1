"""Chooses tokens from logits: the most likely one, or a draw.

Shapes: B rows, V token ids, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apt_core.types import GenerationRequest

COLDEST = 1e-30
"""Below this temperature fp32 cannot tell the draw from the most likely token."""

FIRST_CANDIDATES = 256
"""The most probable tokens that are looked at first for top-p; all are sorted only where these do
not have its probability together."""


@dataclass(frozen=True)
class Sampling:
    """The settings of a request that decide how a token is drawn from its logits."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    @classmethod
    def of(cls, request: GenerationRequest) -> Sampling:
        """Those of ``request``."""
        return cls(request.temperature, request.top_k, request.top_p, request.min_p)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without a draw."""
        return self.temperature < COLDEST or self.top_k == 1


def choose(logits: Tensor, sampling: Sampling, draws: Tensor | None) -> Tensor:
    """Token ids, int64 [B], from ``logits`` [B, V]; ``draws`` [B] are uniform numbers in [0, 1),
    float64, that are not needed where ``sampling`` is greedy.

    The token is the first, in the order of ids, whose cumulated probability exceeds the draw. A
    row's token thus depends on its own logits and draw alone, and not on which of two tokens that
    are equally likely comes first. The host does not wait for the device.
    """
    if sampling.greedy:
        return logits.argmax(-1)
    assert draws is not None
    probabilities, ids = _candidates(logits, sampling)
    if ids is not None:
        ids, order = ids.sort(-1)
        probabilities = probabilities.gather(-1, order)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulated = probabilities.cumsum(-1, dtype=exact)
    # A draw next to 1 must not exceed the sum, whose last digits are rounded.
    below = cumulated[:, -1] * (1 - 4 * torch.finfo(exact).eps)
    wanted = torch.minimum(draws.to(exact) * cumulated[:, -1], below)
    places = torch.searchsorted(cumulated, wanted[:, None], right=True)
    # Beyond the last one where the logits are not finite, which the caller sees.
    places = places.clamp_max(cumulated.shape[-1] - 1)
    return places[:, 0] if ids is None else ids.gather(1, places)[:, 0]


def candidates(logits: Tensor, request: GenerationRequest) -> tuple[Tensor, Tensor]:
    """The probabilities [K] and token ids [K] among which ``request`` draws, the most probable
    first, for ``logits`` [V] and a temperature above 0. Waits for the device."""
    sampling = Sampling.of(request)
    probabilities, ids = _candidates(logits[None], sampling)
    if ids is None:
        probabilities, ids = probabilities.sort(dim=-1, descending=True)
    kept = int((probabilities[0] > 0).sum())
    kept = max(1, kept)
    found = probabilities[0, :kept]
    return found / found.sum(), ids[0, :kept]


def _candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Probabilities, up to a factor, [B, K] in falling order, and their ids; or of all ids in their
    own order [B, V], and None. What may not be drawn has 0."""
    size = logits.shape[-1]
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    ids: Tensor | None = None
    if 0 < sampling.top_k < size:
        scaled, ids = scaled.topk(sampling.top_k)
    probabilities = scaled.softmax(-1)
    if sampling.top_p < 1:
        if ids is None:
            probabilities, ids = _likeliest(probabilities, sampling.top_p)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.where(before < sampling.top_p, 0)
    if sampling.min_p > 0:
        highest = probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.where(probabilities >= sampling.min_p * highest, 0)
    return probabilities, ids


def _likeliest(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The most probable tokens in falling order, at least those that have ``top_p`` together."""
    size = probabilities.shape[-1]
    if probabilities.device.type != "cpu" or size <= 2 * FIRST_CANDIDATES:
        return probabilities.sort(dim=-1, descending=True)
    values, ids = probabilities.topk(FIRST_CANDIDATES)
    enough = values.sum(-1) > top_p
    if enough.all():
        return values, ids
    # Row by row, since what ties must be in one order whatever the other rows need.
    all_values, all_ids = torch.zeros_like(probabilities), ids.new_zeros(probabilities.shape)
    all_values[enough, :FIRST_CANDIDATES] = values[enough]
    all_ids[enough, :FIRST_CANDIDATES] = ids[enough]
    all_values[~enough], all_ids[~enough] = probabilities[~enough].sort(dim=-1, descending=True)
    return all_values, all_ids


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """``logits`` [V] with a repetition penalty on the tokens ``seen`` [V], a boolean mask."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def log_probabilities(logits: Tensor, tokens: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``logits`` [B, V]: the log-probabilities of ``tokens`` [B], and those of the ``most``
    likely tokens with their ids [B, most]."""
    logprobs = logits.log_softmax(-1)
    of_token = logprobs.gather(1, tokens[:, None])[:, 0]
    values, ids = logprobs.topk(min(most, logprobs.shape[-1]))
    return of_token, values, ids
