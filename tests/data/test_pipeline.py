"""What is done to documents before they are tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest

from apt_core.data.pipeline.dedup import SeenDocuments
from apt_core.data.pipeline.minhash import BINS, band_rows, signature
from apt_core.data.pipeline.prepare import (
    EMPTY,
    KEPT,
    TOO_LONG,
    TOO_SHORT,
    PipelineSettings,
    content_digest,
    learned_bytes,
    prepare,
    split_position,
)
from apt_core.data.pipeline.split import (
    BY_POSITION,
    TRAIN,
    VAL,
    WHOLE,
    SplitRule,
    SplitTally,
    hold_out,
)
from apt_core.providers import Document, Message

TURNS = (Message("user", "ﬁx"), Message("assistant", "é"))


@pytest.mark.parametrize(
    ("document", "settings", "status"),
    [
        (Document(text="abc"), {}, KEPT),
        (Document(text=""), {}, EMPTY),
        (Document(text=" \n\t" * 100), {}, EMPTY),
        (Document(text=" " * 100 + "x"), {}, KEPT),
        (Document(prompt="", response="\n"), {}, EMPTY),
        (Document(prompt="", response="x"), {}, KEPT),
        (Document(text="abc"), {"min_chars": 4}, TOO_SHORT),
        (Document(text="abc"), {"min_chars": 3, "max_chars": 3}, KEPT),
        (Document(prompt="ab", response="cd"), {"max_chars": 3}, TOO_LONG),
        # The length is that of what is kept.
        (Document(text="ﬁ"), {"normalize": "NFKC", "max_chars": 1}, TOO_LONG),
    ],
)
def test_documents_are_filtered_by_their_length(document, settings, status):
    assert prepare(document, PipelineSettings(**settings))[0] == status


def test_all_texts_of_a_document_are_normalised():
    def normalised(document, form):
        return prepare(document, PipelineSettings(normalize=form))[1]

    decomposed = "e\u0301 ﬁ"
    for form, expected in [("none", decomposed), ("NFC", "é ﬁ"), ("NFKC", "é fi")]:
        assert normalised(Document(text=decomposed), form).text == expected
        pair = normalised(Document(prompt=decomposed, response=decomposed), form)
        assert (pair.prompt, pair.response) == (expected, expected)
    turns = normalised(Document(messages=TURNS, where="f:1", key="k"), "NFKC")
    assert [message.content for message in turns.messages] == ["fix", "é"]
    assert (turns.where, turns.key) == ("f:1", "k")


def test_documents_have_one_digest_only_if_they_are_of_one_form_and_say_the_same():
    pair = Document(prompt="a", response="b")
    documents = [
        Document(text="a"),
        pair,
        Document(text=pair.content),
        Document(prompt="ab", response=""),
        Document(messages=(Message("user", "a"), Message("assistant", "b"))),
        Document(messages=(Message("user", "a"), Message("user", "b"))),
    ]
    digests = [content_digest(document) for document in documents]
    assert len(set(digests)) == len(documents)
    assert content_digest(Document(text="a", where="elsewhere", key="k")) == digests[0]


def test_a_key_decides_the_side_whatever_the_content():
    one, other = Document(text="a", key="cat"), Document(text="b", key="cat")
    positions = {split_position(each, content_digest(each)) for each in (one, other)}
    assert len(positions) == 1
    assert split_position(Document(text="a"), content_digest(one)) not in positions


def test_learned_bytes_are_those_of_answers():
    assert learned_bytes(Document(text="é!"), True) == 3
    assert learned_bytes(Document(text="é!"), False) == 3
    pair = Document(prompt="abc", response="é")
    assert [learned_bytes(pair, learned) for learned in (False, True)] == [2, 5]
    assert learned_bytes(Document(messages=TURNS), False) == 2


@pytest.mark.parametrize(
    ("text", "fraction", "held_out"),
    [
        ("a" * 90 + "\n\n" + "b" * 10, 0.1, "b" * 10),
        ("a" * 90 + "\n" + "b" * 10, 0.1, "b" * 10),
        ("a" * 100, 0.1, "a" * 10),
        ("x", 0.5, "x"),
        ("", 0.5, ""),
    ],
)
def test_the_end_of_a_text_is_held_out_at_a_border(text, fraction, held_out):
    train, val = hold_out(text, fraction)
    assert (train + val, val) == (text, held_out)


def tally(texts=(), others=(), all_too_long=False):
    seen = SplitTally(all_too_long=all_too_long)
    for is_text, positions in ((True, texts), (False, others)):
        for position in positions:
            seen.add(position, is_text)
    return seen


def test_a_split_serves_unless_a_side_is_empty_or_documents_are_few():
    rule = SplitRule.of_fraction(0.1)
    tenth, end = WHOLE // 9, WHOLE - 1
    assert rule.corrected(tally(texts=[0, *[end] * 19])) is None
    # Nothing below: the first position is held out, not more.
    assert rule.corrected(tally(texts=range(tenth, tenth + 30))).below == tenth + 1
    # Nothing above: the last one is left to train on.
    assert rule.corrected(tally(texts=range(30))).below == 29
    # One key for all: it cannot be on both sides.
    assert rule.corrected(tally(texts=[end] * 30)).below == end
    few = rule.corrected(tally(texts=[end]))
    assert few.inside and few.below == rule.below
    assert list(few.pieces(Document(text="a" * 10))) == [
        (TRAIN, Document(text="a" * 9, ends=False)),
        (VAL, Document(text="a", begins=False)),
    ]
    assert list(few.pieces(Document(text="x"))) == [(VAL, Document(text="x"))]
    pairs = rule.corrected(tally(others=[end - 5, end]))
    assert not pairs.inside and pairs.below == end - 4
    pair = Document(prompt="a", response="b")
    assert list(few.pieces(pair)) == [(BY_POSITION, pair)]
    both = rule.corrected(tally(texts=[0], others=[end - 5, end]))
    assert both.inside and both.below == end - 4
    # With a limit, a text gives up at most a twentieth of it.
    bounded = SplitRule.of_fraction(0.1, 100).corrected(tally(texts=[end]))
    assert [len(part.text) for _, part in bounded.pieces(Document(text="a" * 1000))] == [995, 5]
    # Where all that was to be held out is too long, the first position is held out all the same.
    long = SplitRule.of_fraction(0.1, 100).corrected(tally(texts=range(30), all_too_long=True))
    assert (long.below, long.most) == (1, None)
    assert long.corrected(tally(texts=range(30))) is None
    # A corrected rule serves.
    for seen in (tally(texts=range(30)), tally([end]), tally(others=[end]), tally([0], [5, 6])):
        assert rule.corrected(seen).corrected(seen) is None


VOCABULARY = [f"w{number}" for number in range(2000)]


def words(draws, count):
    return draws.choices(VOCABULARY, k=count)


def shingles(text):
    text = " ".join(text.casefold().split())
    return {text[start : start + 13] for start in range(len(text) - 12)}


@pytest.mark.parametrize("count", [30, 200])
def test_signatures_estimate_the_similarity(count):
    draws = random.Random(1)
    errors = []
    for _ in range(30):
        one = words(draws, count)
        other = [draws.choice([word, word, word, word, word, "x"]) for word in one]
        texts = " ".join(one), " ".join(other)
        sets = shingles(texts[0]), shingles(texts[1])
        true = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        equal = signature(texts[0]) == signature(texts[1])
        errors.append(float(np.mean(equal)) - true)
    assert abs(np.mean(errors)) < 0.03
    assert np.std(errors) < 0.08


def test_signatures_do_not_depend_on_case_white_space_or_stretches(monkeypatch):
    text = " ".join(words(random.Random(2), 3000))
    whole = signature(text)
    assert whole.shape == (BINS,) and whole.dtype == np.uint32
    assert np.array_equal(signature(text.upper().replace(" ", " \n ")), whole)
    monkeypatch.setattr("apt_core.data.pipeline.minhash.STRETCH", 100)
    assert np.array_equal(signature(text), whole)
    assert signature("a").shape == signature("").shape == (BINS,)
    assert not np.array_equal(signature("a"), signature("b"))


def test_bands_are_such_that_pairs_at_the_threshold_are_compared():
    rows = {threshold: band_rows(threshold) for threshold in (0.0, 0.5, 0.8, 1.0)}
    assert rows == {0.0: 1, 0.5: 3, 0.8: 6, 1.0: BINS}


def test_the_first_of_equal_documents_stays(tmp_path):
    seen = SeenDocuments(tmp_path)
    digests = [content_digest(Document(text=str(number % 50))) for number in range(200)]
    assert [seen.repeats(digest) for digest in digests] == [False] * 50 + [True] * 150
    seen.close()
    assert list(tmp_path.iterdir()) == []


def test_near_duplicates_are_found_by_the_threshold(tmp_path):
    draws = random.Random(3)
    texts = [" ".join(words(draws, 200)) for _ in range(50)]
    seen = SeenDocuments(tmp_path, 0.8)
    assert not any(seen.nearly_repeats(signature(text)) for text in texts)
    # A word appended, one changed: found. Half replaced: another document.
    assert all(seen.nearly_repeats(signature(text + " end")) for text in texts)
    changed = [text.replace(text.split()[100], "other", 1) for text in texts]
    assert all(seen.nearly_repeats(signature(text)) for text in changed)
    halves = [text[: len(text) // 2] + " ".join(words(draws, 100)) for text in texts]
    assert not any(seen.nearly_repeats(signature(text)) for text in halves)
    seen.close()


def test_what_was_seen_is_on_disk(tmp_path, monkeypatch):
    """With a cache of memory that is far too small, the file holds the digests."""
    monkeypatch.setattr("apt_core.data.pipeline.dedup.CACHE_KIB", 64)
    seen = SeenDocuments(tmp_path)
    digests = [number.to_bytes(4, "big") * 8 for number in range(20_000)]
    assert not any(seen.repeats(digest) for digest in digests)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size > 16 * len(digests)
    assert all(seen.repeats(digest) for digest in digests)
    seen.close()
