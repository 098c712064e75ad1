"""The vote itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from apt_core import GenerationRequest
from apt_core.inference import Branch
from apt_plugins.voter.ballot import distance, majority, medoid, weights
from apt_plugins.voter.decoder import VotingDecoder, entropy
from apt_plugins.voter.settings import VotingSettings


def decoder(*, threshold=0.0, k=3, normalized=False, weight_temperature=None, **request):
    request = GenerationRequest("", **{"temperature": 1.0, "top_k": 0, **request})
    settings = VotingSettings(
        threshold=threshold, k=k, normalized=normalized, weight_temperature=weight_temperature
    )
    return VotingDecoder(request, settings)


def shares_of_wins(probabilities, k):
    """How often each id wins, summed over all that k voters may do."""
    shares = [0.0] * len(probabilities)
    for votes in itertools.product(range(len(probabilities)), repeat=k):
        counts = [votes.count(i) for i in range(len(probabilities))]
        winner = max(range(len(probabilities)), key=lambda i: (counts[i], probabilities[i]))
        shares[winner] += math.prod(probabilities[v] for v in votes)
    return shares


# The critical values of chi-square at a level of 0.001, by degrees of freedom.
CRITICAL = {1: 10.83, 2: 13.82}


@pytest.mark.parametrize(
    ("probabilities", "k"),
    [
        ((0.4, 0.6), 3),
        ((0.6, 0.4), 2),
        ((0.35, 0.65), 4),
        ((0.3, 0.5, 0.2), 3),
        ((0.2, 0.3, 0.5), 5),
    ],
)
def test_simulated_voters_match_the_binomial(probabilities, k):
    logits = torch.tensor(probabilities).log()
    voting = decoder(k=k, seed=11)
    rounds = 4000
    wins = [0] * len(probabilities)
    for _ in range(rounds):
        wins[voting.choose(torch.zeros(1, 1), logits)] += 1
    expected = [share * rounds for share in shares_of_wins(probabilities, k)]
    assert sum(expected) == pytest.approx(rounds)
    square = sum((w - e) ** 2 / e for w, e in zip(wins, expected, strict=True))
    assert square < CRITICAL[len(probabilities) - 1]
    assert voting.votes == voting.tokens == rounds


def test_the_entropy_is_in_nats_and_forbidden_tokens_take_no_part():
    assert entropy(torch.zeros(50)) == pytest.approx(math.log(50))
    logits = torch.full((50,), float("-inf"))
    logits[7] = 3.0
    assert entropy(logits) == 0.0
    logits[9] = 3.0
    assert entropy(logits) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("ids", "threshold", "normalized", "votes"),
    [
        (4, math.log(4) - 0.01, False, 1),
        (4, math.log(4) + 0.01, False, 0),
        (4, 0.99, True, 1),
        (4, 1.01, True, 0),
        (50, 0.99, True, 1),
    ],
)
def test_a_vote_is_held_from_the_threshold_on(ids, threshold, normalized, votes):
    voting = decoder(threshold=threshold, normalized=normalized)
    chosen = voting.choose(torch.zeros(1, 1), torch.zeros(ids))
    assert (voting.votes, voting.tokens) == (votes, 1)
    assert (chosen is None) == (votes == 0)


def test_the_entropy_is_that_of_the_temperature_and_of_all_tokens():
    logits = torch.tensor([2.0, 0.0, 0.0, 0.0])
    threshold = (entropy(logits / 2.0) + entropy(logits)) / 2
    for temperature, votes in ((1.0, 0), (2.0, 1)):
        voting = decoder(threshold=threshold, temperature=temperature, top_k=1)
        voting.choose(torch.zeros(1, 1), logits)
        assert voting.votes == votes


def test_voters_draw_from_what_the_request_allows():
    logits = torch.tensor([0.0, 0.1, 5.0, 5.1])
    two = decoder(k=2, top_k=2, temperature=1.0)
    assert {two.choose(torch.zeros(1, 1), logits) for _ in range(50)} == {2, 3}
    cold = decoder(k=2, temperature=0.001)
    assert {cold.choose(torch.zeros(1, 1), logits) for _ in range(50)} == {3}


def test_a_vote_is_a_function_of_the_seed_and_the_position_alone():
    logits = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def choices(seed, threshold=0.0):
        voting = decoder(seed=seed, threshold=threshold)
        return [voting.choose(torch.zeros(1, 1), logits) for _ in range(20)]

    first = choices(5)
    torch.manual_seed(99)
    assert choices(5) == first != choices(6)
    assert len(set(first)) > 3
    after_a_certain_one = decoder(seed=5, threshold=1.0)
    certain = torch.full((64,), -50.0)
    certain[0] = 50.0
    assert after_a_certain_one.choose(torch.zeros(1, 1), certain) is None
    assert after_a_certain_one.choose(torch.zeros(1, 1), logits) == first[1]


@pytest.mark.parametrize("normalized", [False, True])
def test_a_vocabulary_of_one_token_has_one_winner(normalized):
    voting = decoder(threshold=0.0, normalized=normalized)
    assert voting.choose(torch.zeros(1, 1), torch.zeros(1)) == 0


def test_a_vote_leaves_the_global_generator_and_the_logits_alone():
    logits, state = torch.zeros(8), torch.get_rng_state()
    decoder().choose(torch.zeros(1, 1), logits)
    assert torch.get_rng_state().equal(state)
    assert logits.equal(torch.zeros(8))


def branch(text, *logprobs):
    ids = tuple(text.encode())
    return Branch(ids, logprobs if len(logprobs) == len(ids) else (*logprobs,) * len(ids))


def test_the_distance_is_that_of_edits_over_the_longer_length():
    for one, other, expected in (
        ("kitten", "sitting", 3 / 7),
        ("abcd", "bcda", 2 / 4),
        ("a", "abcd", 3 / 4),
        ("ab", "cd", 1),
        ("same", "same", 0),
    ):
        assert distance(one.encode(), other.encode()) == pytest.approx(expected)
        assert distance(other.encode(), one.encode()) == distance(one.encode(), other.encode())


def test_the_medoid_is_nearest_to_all_and_the_surest_of_equals():
    equal = [1 / 3] * 3
    found = [branch("=70;", -0.1), branch("=72;", -2.0), branch("x72;", -3.0)]
    assert medoid(found, equal) == 1
    assert medoid(found, [0.9, 0.05, 0.05]) == 0
    assert medoid([branch("ab", -2.0), branch("cd", -1.0), branch("ef", -1.0)], equal) == 1
    # Of single tokens it is the one with the most votes.
    assert medoid([branch("a", -0.1), branch("b", -2.0), branch("b", -2.0)], equal) == 1


def test_a_majority_counts_answers_with_the_weights_of_their_voters():
    found = [branch("x", -0.2), branch("y", -3.0), branch("z", -2.0)]
    answers = {found[0]: "8", found[1]: "7", found[2]: "7"}
    assert majority(found, [1 / 3] * 3, answers.__getitem__) == 2
    shares = weights([-0.2, -3.0, -2.0], 1.0)
    assert shares == pytest.approx(torch.tensor([-0.2, -3.0, -2.0]).softmax(0).tolist())
    assert majority(found, shares, answers.__getitem__) == 0
    assert weights([-0.2, -3.0, -2.0], None) == [1 / 3] * 3
    assert sum(weights([-1e5, -2e5], 1e-3)) == 1


def test_weights_by_confidence_favour_probable_tokens():
    logits = torch.tensor([0.65, 0.35]).log()
    wins = {}
    for temperature in (None, 100.0, 0.1, 1e-6):
        voting = decoder(k=3, seed=2, weight_temperature=temperature)
        wins[temperature] = sum(voting.choose(torch.zeros(1, 1), logits) == 0 for _ in range(500))
    # Equal weights: 0.718; the surest voter alone: 1 - 0.35 ** 3 = 0.957.
    assert wins[None] == wins[100.0] < 400 < 450 < wins[1e-6]
    assert wins[0.1] == wins[1e-6]
