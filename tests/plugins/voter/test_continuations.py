"""Votes among continuations of several tokens, by models whose probabilities are known."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from torch import nn

from apt_core import GenerationRequest
from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.inference import Engine
from apt_core.providers import SpecialTokens
from apt_core.testing import tiny_session
from apt_core.types import ModelOutput

VOTER = "apt_plugins.voter.plugin"
RIGHT = 0.6
WORDS = {":": 0.5, "=": 0.3, ">": 0.2}


class Endless(ByteTokenizer):
    """Without an end of documents, so that every text gets as long as it may."""

    special = SpecialTokens()


class Table(nn.Module):
    """After "?" a mark, of which the answer does not depend; then 7 with the probability RIGHT and
    else 3; then the end. ``computed`` counts the tokens after which it was asked."""

    def __init__(self, eos):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.eos, self.computed = eos, 0

    def forward(self, input_ids, **options):
        self.computed += 1
        last = chr(int(input_ids[0, -1]))
        after = {"?": WORDS, **{mark: {"7": RIGHT, "3": 1 - RIGHT} for mark in WORDS}}.get(last)
        probabilities = torch.zeros(256)
        for token, share in (after or {}).items():
            probabilities[ord(token)] = share
        if after is None:
            probabilities[self.eos] = 1.0
        logits = probabilities.log()
        logits = logits.clamp_min(-100.0).expand(1, input_ids.shape[1], -1)
        return ModelOutput(logits, torch.zeros(1, input_ids.shape[1], 1))


@pytest.fixture
def answered():
    """``answered(number, **voting)``: the results of as many questions, the manager and how many
    tokens the table was asked after."""

    def answered(number, *plugins, **voting):
        plugins = (*plugins, VOTER) if voting else plugins
        keys = {f"model.voting.{key}": value for key, value in voting.items()}
        session = tiny_session(*plugins, overrides=keys, strict=False)
        tokenizer = ByteTokenizer()
        table = Table(tokenizer.special.eos)
        session = replace(session, model=table, tokenizer=tokenizer)
        requests = [
            GenerationRequest("2 + 5?", max_new_tokens=8, seed=seed) for seed in range(number)
        ]
        return Engine(session).run(requests), session.manager, table.computed

    return answered


def interval(share, number):
    """What a count of successes is with a probability of 0.999."""
    spread = NormalDist().inv_cdf(0.9995) * math.sqrt(number * share * (1 - share))
    return number * share - spread, number * share + spread


def test_the_accuracy_of_a_majority_is_that_of_the_binomial(answered):
    number = 400
    for k, voting in (
        (1, {}),
        (3, {"winner": "majority"}),
        (7, {"winner": "majority"}),
    ):
        settings = {"threshold": 0.0, "k": k, "length": 8, **voting} if voting else {}
        results, manager, _ = answered(number, **settings)
        right = sum(result.text.endswith("7") for result in results)
        share = sum(
            math.comb(k, wins) * RIGHT**wins * (1 - RIGHT) ** (k - wins)
            for wins in range(k // 2 + 1, k + 1)
        )
        low, high = interval(share, number)
        assert low < right < high, (k, right, share * number)
        # A voter computes what follows the mark and the answer: the first token is drawn from what
        # is known.
        assert {result.extra_tokens for result in results} == {2 * k if voting else 0}
        assert all(len(result.token_ids) == 2 for result in results)
        assert not voting or manager.records["voter"].failures == []


def test_a_vote_ends_with_the_first_window_that_agrees(answered):
    voting = {"threshold": 0.0, "k": 6, "length": 8, "winner": "majority"}
    whole, _, all_computed = answered(60, **voting)
    early, _, computed = answered(60, **voting, window=2)
    costs = [result.extra_tokens for result in early]
    assert {4, 8, 12} == set(costs)
    # 0.6² + 0.4² of the windows agree.
    low, high = interval(0.52, 60)
    assert low < costs.count(4) < high
    assert all_computed - computed == 60 * 12 - sum(costs)
    # Those that no window ended are the votes of all.
    assert all(
        one.text[-1] == other.text[-1]
        for one, other in zip(whole, early, strict=True)
        if other.extra_tokens == 12
    )


def test_the_medoid_is_taken_whole_with_the_end_of_the_text(answered):
    results, _, _ = answered(200, threshold=0.0, k=5, length=8)
    assert {result.finish_reason for result in results} == {"stop"}
    texts = [result.text for result in results]
    assert {len(text) for text in texts} == {2}
    # Both the mark and the answer count, so that the probable ones win more often than alone.
    alone = [result.text for result in answered(200)[0]]
    assert texts.count(":7") > alone.count(":7") + 20


def test_a_voter_that_fails_amid_a_continuation_leaves_plain_sampling(answered, monkeypatch):
    from apt_plugins.voter import decoder

    plain, _, _ = answered(10)

    def fails(*given):
        raise RuntimeError("no quorum")

    monkeypatch.setattr(decoder, "medoid", fails)
    results, manager, _ = answered(10, threshold=0.0, k=3, length=8)
    assert [result.token_ids for result in results] == [result.token_ids for result in plain]
    assert {result.extra_tokens for result in results} == {6}
    assert "no quorum" in manager.records["voter"].failures[0].error


@pytest.mark.parametrize("batch", [1, 4])
def test_without_a_vote_a_batch_is_plain_token_for_token(batch, caplog):
    caplog.set_level("INFO", "apt.voter")
    requests = [
        GenerationRequest(prompt, max_new_tokens=12, seed=seed, temperature=temperature, top_k=k)
        for seed, (prompt, temperature, k) in enumerate(
            [("The ", 0.3, 0), ("A line", 1.0, 5), ("", 1.7, 0), ("One", 0.0, 0), ("One", 2.0, 1)]
        )
    ]

    def texts(*plugins, **voting):
        keys = {f"model.voting.{key}": value for key, value in voting.items()}
        session = replace(tiny_session(*plugins, overrides=keys), tokenizer=Endless())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in session.model.parameters():
                parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
        return Engine(session, max_batch=batch).run(requests)

    plain = texts()
    for length in (1, 4):
        assert texts(VOTER, threshold=100.0, length=length) == plain
    # Three of five requests sample, and each tells of itself.
    assert caplog.messages.count("0 of 12 tokens were put to the vote") == 6
    voted = texts(VOTER, threshold=0.0, length=4, k=5)
    assert voted[3:] == plain[3:]
    assert [result.extra_tokens > 0 for result in voted] == [True, True, True, False, False]
    assert [result.token_ids for result in voted[:3]] != [r.token_ids for r in plain[:3]]


def test_a_vote_depends_on_nothing_but_its_own_request(answered):
    voting = {"threshold": 0.0, "k": 5, "length": 8}
    assert answered(6, **voting)[0][:2] == answered(2, **voting)[0]
