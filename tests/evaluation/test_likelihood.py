"""Likelihoods by windows are those that one computes by hand."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log, prod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from apt_core.evaluation.intervals import difference_of, interval_of, wilson
from apt_core.evaluation.likelihood import Stretch, encode_pair, encode_text, predict
from apt_core.evaluation.metrics import difference_figure, figure_of
from apt_core.evaluation.scoring import Scoring, items_of, score
from apt_core.evaluation.tasks.held_out import TextTask
from apt_core.evaluation.windows import windows_of
from apt_core.providers.task import Choice, ChoiceTask, EncodedPassage, PassageTask
from apt_core.testing import tiny_session
from apt_core.types import ModelOutput

A, B = b"ab"


class Table(nn.Module):
    """After n tokens an ``a`` comes with the probability n / (n + 1), else a ``b``."""

    d_model = 1

    def forward(self, input_ids, mask=None, positions=None):
        logits = torch.full((*input_ids.shape, 256), float("-inf"))
        n = torch.arange(1, input_ids.shape[1] + 1, dtype=torch.float32)
        logits[..., A] = (n / (n + 1)).log()
        logits[..., B] = (1 / (n + 1)).log()
        return ModelOutput(logits, logits)


@pytest.fixture(scope="module")
def table():
    session = tiny_session(overrides={"model.max_seq_len": 4})
    return replace(session, model=Table())


BY_HAND = {
    # By stride: for each of nine tokens how many before it the model sees.
    1: [1, 2, 3, 4, 4, 4, 4, 4, 4],
    2: [1, 2, 3, 4, 3, 4, 3, 4, 4],
    3: [1, 2, 3, 4, 2, 3, 4, 3, 4],
    4: [1, 2, 3, 4, 1, 2, 3, 4, 4],
}


@pytest.mark.parametrize("stride", BY_HAND)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_perplexity_by_sliding_windows_is_that_computed_by_hand(table, stride, batch_size):
    probabilities = [n / (n + 1) for n in BY_HAND[stride]]
    scoring = Scoring(batch_size=batch_size, stride=stride)
    found = score(table, items_of("text", TextTask(["a" * 9]), scoring), scoring.asking())
    assert found.figures["perplexity"].value == pytest.approx(prod(probabilities) ** (-1 / 9))
    bits = -log(prod(probabilities)) / log(2) / 9
    assert found.figures["bits_per_byte"].value == pytest.approx(bits)
    assert (found.found.units, found.found.too_long) == ("windows", 1)


def test_each_token_counts_once_and_no_window_reads_more_than_the_context():
    for length in range(2, 30):
        for first in (1, length // 2 + 1, length - 1):
            for context in (1, 2, 5, 40):
                for stride in {1, context, (context + 1) // 2}:
                    windows = [*windows_of(length, first, context, stride)]
                    counted = [i for w in windows for i in range(w.counted, w.stop)]
                    assert counted == [*range(first, length)]
                    for window in windows:
                        assert 0 <= window.start < window.counted
                        assert window.stop - 1 - window.start <= context
                        # Less is before a token only where there is no more.
                        before = window.counted - window.start
                        assert before >= min(window.counted, context - stride + 1)
                    assert all(w.stop - w.counted <= stride for w in windows[1:])
    for stride, first in ((0, 1), (5, 1), (1, 0)):
        with pytest.raises(ValueError, match=r"stride|first token"):
            [*windows_of(9, first, 4, stride)]


def test_a_batch_of_texts_gives_each_what_it_has_alone():
    session = tiny_session()
    texts = ["a", "Some words.", "x" * 40, "éè 火", "Not long, not short."]
    stretches = [encode_text(session.tokenizer, text) for text in texts]
    together = predict(session, stretches, stride=5, batch_size=7)
    for stretch, of in zip(stretches, together, strict=True):
        (alone,) = predict(session, [stretch], stride=5, batch_size=1)
        assert np.allclose(alone.losses, of.losses, rtol=0, atol=1e-5)
        assert (alone.likeliest == of.likeliest).all()
        for window in windows_of(len(stretch.ids), 1, 16, 5):
            ids = torch.tensor(stretch.ids[window.start : window.stop])
            with torch.no_grad():
                logits = session.model.eval()(ids[None, :-1]).logits[0]
            losses = nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            expected = losses[window.counted - window.start - 1 :].numpy()
            assert np.allclose(of.losses[window.counted - 1 : window.stop - 1], expected, atol=1e-5)


def test_a_prediction_stops_when_it_is_interrupted_and_leaves_the_model_as_it_was():
    session = tiny_session()
    session.model.train()
    asked = iter([False, True])
    stretches = [encode_text(session.tokenizer, "some text")] * 3
    done = []
    stopped = predict(
        session, stretches, batch_size=1, interrupted=lambda: next(asked), advance=done.append
    )
    assert stopped is None and done == [pytest.approx(1 / 3)]
    assert session.model.training and torch.is_grad_enabled()


class Learned(PassageTask):
    def items(self):
        # Of the first document the last two tokens are learned, which are three bytes.
        return [
            EncodedPassage((A, A, A, A), (False, False, True, True), 3),
            EncodedPassage((A, A), None, 2),
        ]


def test_only_what_is_learned_of_a_document_counts(table):
    found = score(table, items_of("learned", Learned(), Scoring()), Scoring().asking())
    losses = -log(3 / 4) - log(4 / 5), -log(1 / 2) - log(2 / 3)
    assert found.found.units == "documents"
    assert found.figures["perplexity"].value == pytest.approx(exp(sum(losses) / 4))
    assert found.figures["bits_per_byte"].value == pytest.approx(sum(losses) / log(2) / 5)


class Choices(ChoiceTask):
    def items(self):
        return [
            Choice("", ("aab", "ab"), 1),  # 1/2 2/3 1/4 = .083 against 1/2 1/3 = .167
            Choice("", ("aab", "ab"), 0),  # the same, and .437 a byte against .408
            Choice("aaaaaaa", ("bb", "a"), 1),
            Choice("", ("a", "a"), 0),  # of equals the first
        ]


def test_choices_are_those_of_the_highest_likelihood(table):
    found = score(table, items_of("choices", Choices(), Scoring()), Scoring().asking())
    assert found.found.sums["accuracy"][:, 0].tolist() == [1, 0, 1, 1]
    assert found.found.sums["accuracy_per_byte"][:, 0].tolist() == [0, 1, 1, 1]
    assert found.found.too_long == 1
    assert found.figures["accuracy"].value == 0.75


def test_a_pair_is_encoded_as_the_text_that_has_both():
    tokenizer = tiny_session().tokenizer
    eos = tokenizer.special.eos
    pair = encode_pair(tokenizer, "One is ", "two")
    assert (bytes(pair.ids), pair.first) == (b"One is two", 6)  # the space is predicted
    assert encode_pair(tokenizer, " ", "x") == Stretch([eos, *b" x"], 1)
    response = encode_pair(tokenizer, "Q", "A", "response")
    assert (bytes(response.ids), response.first) == (b"Q\nA", 2)
    chat = encode_pair(tokenizer, "Q", "A", "chat")
    roles = tokenizer.special.roles
    assert chat.ids[0] == roles["user"] and chat.ids[-2:] == [roles["assistant"], *b"A"]
    assert chat.first == len(chat.ids) - 1
    bos = SimpleNamespace(special=SimpleNamespace(bos=1, eos=2), encode=tokenizer.encode)
    assert encode_pair(bos, "a", "b") == Stretch([1, *b"ab"], 2)


def test_intervals_are_wilsons_of_shares_and_a_bootstrap_of_ratios():
    # Newcombe, 1998, Statistics in Medicine 17, 857, table I: 81 of 263.
    interval = wilson(81, 263)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20).low == 0.0 and wilson(20, 20).high == 1.0
    draw = np.random.default_rng(3)
    ratios = np.stack([draw.normal(2.0, 1.0, 400), np.ones(400)], axis=1)
    interval = interval_of(ratios, lambda values: values)
    assert interval.method == "bootstrap"
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert interval_of(ratios[:4], lambda values: values) is None
    shares = np.stack([np.arange(10) % 2, np.ones(10)], axis=1)
    assert interval_of(shares.astype(float), lambda values: values).method == "wilson"


def test_a_paired_difference_is_known_better_than_the_scores():
    draw = np.random.default_rng(5)
    hard = draw.normal(3.0, 1.0, 300)
    one = np.stack([hard, np.ones(300)], axis=1)
    other = np.stack([hard - draw.normal(0.1, 0.05, 300), np.ones(300)], axis=1)
    interval = difference_of(one, other, lambda values: values)
    assert -0.12 < interval.low < -0.1 < interval.high < -0.08
    figure = difference_figure("perplexity", one, other)
    values = [figure_of("perplexity", each).value for each in (one, other)]
    assert figure.value == pytest.approx(values[1] - values[0]) and figure.high < 0
    assert np.isnan(figure_of("accuracy", np.zeros((0, 2))).value)
