"""What is said of windows and parts is what they hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_core.data.describe import (
    fertility,
    length_figures,
    mixture_figures,
    part_figures,
    view_window,
)
from apt_core.data.order import Order, Segment, StepPlan
from apt_core.data.packing.concat import ConcatWindows
from apt_core.data.packing.pieces import PieceIndex, PieceWindows, pack_documents, pad_documents
from apt_core.data.packing.rows import IGNORED, Windows
from apt_core.data.store.parts import ArrayPart
from apt_core.providers import Encoded
from apt_core.providers.tokenizer import SpecialTokens, TokenizerProvider

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)

END, PAD = 0, 1


class Characters(TokenizerProvider):
    """An id is a character; 0 and 1 are special."""

    name = "characters"
    special = SpecialTokens(eos=END, pad=PAD, names={END: "<end>", PAD: "<pad>"})  # type: ignore[assignment]
    vocab_size = 1000  # type: ignore[assignment]

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i > PAD)


def windows_of(packing: str, part: ArrayPart, seq_len: int) -> Windows:
    if packing == "concat":
        return ConcatWindows(part, seq_len)
    make = pack_documents(part, seq_len)
    if packing == "pad":
        make = pad_documents(part, seq_len, truncation=False)
    return PieceWindows(part, seq_len, PieceIndex.of(make), packing == "documents", pad=PAD)


def documents(*texts: str) -> ArrayPart:
    """Texts whose first half, up to a "|", is not learned; "." is a special token."""
    found = []
    for text in texts:
        ids = np.array([END if c == "." else ord(c) for c in text], dtype=np.uint16)
        learned = np.arange(len(text)) > text.find("|") if "|" in text else None
        found.append(Encoded(ids, learned))
    return ArrayPart.of(found, num_bytes=sum(map(len, texts)))


def shown(view: dict) -> list[tuple[str, bool]]:
    """The characters of a view, and whether each is learned."""
    return [
        (name, piece["learned"])
        for document in view["documents"]
        for piece in document["pieces"]
        for name in ("." if "special" in piece else piece["text"])
    ]


@quick
@given(
    texts=st.lists(st.text("abc|.", min_size=1, max_size=30), min_size=1, max_size=12),
    packing=st.sampled_from(["concat", "documents", "pad"]),
    seq_len=st.integers(1, 20),
)
def test_a_view_has_every_token_of_the_window_and_marks_its_targets(texts, packing, seq_len):
    part = documents(*texts)
    windows = windows_of(packing, part, seq_len)
    for index in range(len(windows)):
        view = view_window(windows, part, Characters(), index)
        rows = windows.rows(np.array([index]))
        characters = shown(view)
        assert sum(learned for _, learned in characters) == view["targets"]
        assert view["targets"] == np.count_nonzero(rows.targets != IGNORED)
        place = 0
        for document in view["documents"]:
            whole = texts[document["document"]]
            assert document["place"] == place and document["document_tokens"] == len(whole)
            count, more = document["tokens"], document["next_id"] is not None
            begin = document["first_token"]
            text = "".join(c for c, _ in shown({"documents": [document]}))
            # What the end of a window predicts may be the next document's.
            assert text[:count] == whole[begin : begin + count] and len(text) == count + more
            place += count
        assert place == view["tokens"] == len(view["input_ids"]) - view["padding"]
        if packing != "concat":  # which repeats the last token
            assert view["pad"] == ("<pad>" if view["padding"] else None)


def test_a_document_is_seen_with_what_is_learned_of_it():
    view = view_window(
        windows_of("pad", documents("ask|tell."), 12), documents("ask|tell."), Characters(), 0
    )
    (document,) = view["documents"]
    assert document["pieces"] == [
        {"text": "ask|", "learned": False},
        {"text": "tell", "learned": True},
        {"special": "<end>", "learned": True},
    ]
    assert document["next_id"] == END and view["padding"] == 4 and view["targets"] == 5


def test_figures_of_a_part():
    part = documents("q|aaa", "q|a", "bbbb")
    packed = part_figures(part, windows_of("documents", part, 8))
    assert packed["windows"] == 2 and (packed["documents"], packed["tokens"]) == (3, 12)
    # 4, 2 and 3 positions, of which 3, 1 and 3 predict what is to be learned.
    assert packed["padding"] == pytest.approx(1 - 9 / 16)
    assert packed["learned"] == pytest.approx(7 / 9)
    assert part_figures(part, windows_of("concat", part, 4))["padding"] == pytest.approx(1 / 12)
    assert part_figures(part, None)["padding"] is None


def test_lengths_are_counted_by_powers_of_two():
    lengths = [1, 2, 3, 4, 7, 8, 1024, 1025]
    part = documents(*("x" * length for length in lengths))
    figures = length_figures(part)
    assert (figures["least"], figures["greatest"]) == (1, 1025)
    assert figures["mean"] == sum(lengths) / len(lengths)
    assert [row for row in figures["histogram"] if row[2]] == [
        [1, 1, 1],
        [2, 3, 2],
        [4, 7, 2],
        [8, 15, 1],
        [1024, 2047, 2],
    ]
    assert len(figures["histogram"]) == 11
    nothing = length_figures(ArrayPart(np.empty(0, np.uint8), []))
    assert nothing == {"least": None, "mean": None, "greatest": None, "histogram": []}


def test_fertility_counts_words_and_leaves_special_tokens_out():
    figures = fertility(documents("two words.", "é one."), Characters())
    assert figures == {
        "tokens": 14,
        "tokens_per_word": 14 / 4,
        "bytes_per_token": 15 / 14,
    }
    assert fertility(documents("."), Characters())["tokens_per_word"] is None
    assert fertility(documents(*["word " * 100_000] * 3), Characters())["tokens"] < 1 << 18


def test_a_mixture_tells_its_weights_and_epochs():
    steps = StepPlan(120, seq_len=8, windows_per_step=4)
    segments = [Segment(1, (3.0, 1.0)), Segment(11, (0.0, 2.0))]
    order = Order(["a", "b"], [100, 20], steps, seed=1, segments=segments)
    figures = mixture_figures(order, 20, ())
    assert [row["step"] for row in figures["steps"]] == [1, 11, 20]
    assert [row["weights"] for row in figures["steps"]] == [
        {"a": 0.75, "b": 0.25},
        *[{"a": 0.0, "b": 1.0}] * 2,
    ]
    # 10 steps give 30 and 10 windows, 10 more 40 of b.
    assert figures["steps"][1]["epochs"] == {"a": 0.3, "b": 0.5}
    assert figures["at_end"] == {"a": 0.3, "b": 2.5}
    assert [row["step"] for row in mixture_figures(order, None, [5])["steps"]] == [5]
    assert mixture_figures(order, None, [5])["at_end"] is None
