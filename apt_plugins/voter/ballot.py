"""Which of several continuations wins a vote."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

from apt_core.inference import Branch


def weights(confidences: Sequence[float], temperature: float | None) -> list[float]:
    """softmax(confidence / temperature); equal weights without a temperature."""
    if temperature is None:
        return [1.0 / len(confidences)] * len(confidences)
    highest = max(confidences)
    shares = [math.exp((each - highest) / temperature) for each in confidences]
    whole = sum(shares)
    return [share / whole for share in shares]


def confidence(branch: Branch) -> float:
    """The mean log-probability of the branch's tokens."""
    return sum(branch.logprobs) / len(branch.logprobs)


def medoid(branches: Sequence[Branch], weight_of: Sequence[float]) -> int:
    """The number of the branch with the smallest weighted sum of distances to all, by
    :func:`distance`; the surest of those that are alike in that, then the first."""
    weight: dict[tuple[int, ...], float] = defaultdict(float)
    for branch, share in zip(branches, weight_of, strict=True):
        weight[branch.token_ids] += share
    sums = {
        one: math.fsum(share * distance(one, other) for other, share in weight.items())
        for one in weight
    }
    return _surest(branches, least_of=[sums[branch.token_ids] for branch in branches])


def majority(
    branches: Sequence[Branch],
    weight_of: Sequence[float],
    answer_of: Callable[[Branch], Hashable],
) -> int:
    """The number of the surest branch of those with the answer that has the most weight; where two
    answers have it, of the branches of both."""
    answers = [answer_of(branch) for branch in branches]
    shares: dict[Hashable, list[float]] = defaultdict(list)
    for answer, share in zip(answers, weight_of, strict=True):
        shares[answer].append(share)
    return _surest(branches, least_of=[-math.fsum(shares[answer]) for answer in answers])


def distance(one: Sequence[int], other: Sequence[int]) -> float:
    """The edit distance of two sequences of tokens (Levenshtein 1966) over the length of the longer
    one: 0 where they are equal, 1 where they have nothing in common in one order."""
    if one == other:
        return 0.0
    before = list(range(len(other) + 1))
    for row, token in enumerate(one, 1):
        here = [row]
        for column, theirs in enumerate(other, 1):
            replaced = before[column - 1] + (token != theirs)
            here.append(min(replaced, before[column] + 1, here[-1] + 1))
        before = here
    return before[-1] / max(len(one), len(other))


def _surest(branches: Sequence[Branch], least_of: Sequence[float]) -> int:
    """The number of the branch with the highest confidence among those of the least figure."""
    least = min(least_of)
    best = [number for number, each in enumerate(least_of) if math.isclose(each, least)]
    return max(best, key=lambda number: (confidence(branches[number]), -number))
