"""Answers to prompts, and the scores of HLBD tasks."""

from __future__ import annotations

import pytest
import torch

from apt_core.data.store.parts import ArrayPart
from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.evaluation import responses
from apt_core.evaluation.responses import Pair, answers, character_f1, pairs_of
from apt_core.providers.documents import Document
from apt_core.providers.tokenizer import Encoded
from apt_core.testing import tiny_session
from apt_plugins.hlbd.scores import scores_of, tasks_of

CPU = torch.device("cpu")


class Marked(ByteTokenizer):
    """Bytes, of which 255 ends a document."""

    @property
    def special(self):
        return super().special.__class__(eos=255)


def pair(prompt, response):
    return Pair(list(prompt.encode()), [*response.encode(), 255])


def one_by_one(model, prompt, length):
    """The most likely tokens, each from the whole text."""
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        for _ in range(length):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("cached", [True, False])
def test_answers_are_those_of_each_prompt_alone(cached, monkeypatch):
    model = tiny_session().model
    if not cached:
        monkeypatch.setattr(type(model), "create_caches", lambda *_: None)
    model.train()
    prompts = [b"ab", b"xyz", b"cd", b"q", b"ef", b"gh"]
    pairs = [Pair(list(p), [0] * n) for p, n in zip(prompts, (3, 1, 5, 4, 2, 2), strict=True)]
    found = answers(model, pairs, device=CPU, vocab_size=256, max_seq_len=16, batch_size=2)
    assert model.training
    model.eval()
    for each, answer in zip(pairs, found, strict=True):
        assert len(answer) >= len(each.response)
        assert answer == one_by_one(model, each.prompt, len(answer))
    assert max(map(len, found)) == 5


def test_an_answer_ends_where_the_model_has_no_more_positions():
    model = tiny_session().model
    pairs = [Pair([1] * 14, [2] * 9), Pair([1] * 16, [2]), Pair([1] * 17, [2])]
    found = answers(model, pairs, device=CPU, vocab_size=256, max_seq_len=16)
    assert [len(answer) for answer in found] == [2, 0, 0]


def test_an_answer_has_ids_of_the_tokenizer_alone():
    model = tiny_session().model
    found = answers(model, [Pair([1, 2], [0] * 8)], device=CPU, vocab_size=3, max_seq_len=16)
    assert max(found[0]) < 3


def test_prompts_with_a_response_are_the_pairs_of_a_part(monkeypatch):
    tokenizer = Marked()
    documents = [
        Document(prompt="1>2 a", response="b"),
        Document(text="2>1 text"),
        Document(prompt="no task", response="c"),
    ]
    conversation = Encoded(torch.arange(4).numpy(), torch.tensor([0, 1, 0, 1]).bool().numpy())
    part = ArrayPart.of([*map(tokenizer.encode_document, documents), conversation])
    pairs = list(pairs_of(part))
    assert [bytes(each.prompt) for each in pairs] == [b"1>2 a\n", b"no task\n"]
    assert pairs[0].response == [ord("b"), 255]
    assert list(pairs_of(ArrayPart.of([tokenizer.encode_document(documents[1])]))) == []
    marks = ["011", "", "0", "1", "01", "0101", "010", "100", "001"]
    ends = torch.tensor([len(each) for each in marks]).cumsum(0).numpy()
    learned = torch.tensor([each == "1" for each in "".join(marks)]).numpy()
    several = ArrayPart(torch.arange(len(learned)).numpy(), ends, learned)
    for block in (1, 2, 4, 100):
        monkeypatch.setattr(responses, "BLOCK", block)
        assert responses.pair_documents(several).tolist() == [0, 4, 8]
    assert responses.pair_at(several, 8) == Pair([17, 18], [19])
    assert [task for task, _ in tasks_of([part, part], tokenizer, None)] == [(1, 2), (1, 2)]
    assert len(tasks_of([part] * 10, tokenizer, 4)) == 4
    assert tasks_of([], tokenizer, 4) == []
    # Of 8 documents in turns of 2 levels, 4 are not all of one of them.
    turns = [Document(prompt=f"{1 + n % 2}>3 a", response="b") for n in range(8)]
    drawn = tasks_of([ArrayPart.of([*map(tokenizer.encode_document, turns)])], tokenizer, 4)
    assert len(drawn) == 4 and {task for task, _ in drawn} == {(1, 3), (2, 3)}


def test_scores_count_exact_answers_and_shared_characters_by_task():
    tasks = [((1, 2), pair("p", "火火")), ((1, 2), pair("q", "abc")), ((2, 1), pair("r", "abcd"))]
    given = [
        [*"火火".encode(), 255, 7, 7],  # what comes after the end does not count
        [*b"abc", 0],  # not ended
        [*b"ax", 255, *b"bcd"],
    ]
    scores = scores_of(tasks, given, Marked())
    row = scores.row()
    assert row["by_task"]["1>2"] == {
        "tasks": 2,
        "exact_match": 0.5,
        "character_f1": pytest.approx((1 + 6 / 7) / 2),
    }
    assert row["by_task"]["2>1"] == {"tasks": 1, "exact_match": 0.0, "character_f1": 1 / 3}
    assert (row["tasks"], row["exact_match"]) == (3, 1 / 3)
    assert (
        scores.table()
        == "given\\asked     1     2\n          1     -  50.0\n          2   0.0     -"
    )
    assert str(scores) == "33.3% of 3 answers exact, F1 of characters 73.0%"


def test_nothing_to_score_is_said():
    scores = scores_of([], [], Marked())
    assert scores.row() == {"tasks": 0} and str(scores) == "no tasks"


def test_the_f1_of_characters_is_between_none_and_all():
    assert character_f1("", "") == character_f1("火", "火") == 1.0
    assert character_f1("", "a") == character_f1("a", "b") == 0.0
    assert character_f1("aab", "ab") == pytest.approx(0.8)
