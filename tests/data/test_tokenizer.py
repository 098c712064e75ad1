from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_core.data.tokenizer import ByteTokenizer
from apt_core.data.tokens import ids_sha256, tokenize
from apt_core.errors import ConfigError

TEXTS = ["", "plain", "中文字符", "👩‍👩‍👧 emoji", "a\x00b\r\n\u2028", "é vs e\u0301"]


@pytest.mark.parametrize("text", TEXTS)
def test_known_texts_round_trip(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text())
def test_any_text_round_trips_as_its_bytes(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode_array(text)
    assert ids.dtype == np.uint8
    assert ids.tolist() == tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(ids) == text


@given(st.lists(st.integers(0, 255)))
def test_any_ids_decode_without_an_error(ids):
    assert isinstance(ByteTokenizer().decode(ids), str)


def test_there_are_exactly_256_ids_and_a_broken_character_is_shown():
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 256
    assert tokenizer.decode(tokenizer.encode("中")[:2]) == "\ufffd"
    with pytest.raises(ValueError):
        tokenizer.encode("\ud800")


def counting(fingerprint: str | None, shift: int = 0) -> tuple[ByteTokenizer, list[str]]:
    calls: list[str] = []

    class Counting(ByteTokenizer):
        def encode_array(self, text):
            calls.append(text)
            return super().encode_array(text) + np.uint8(shift)

        def fingerprint(self):
            return fingerprint

    return Counting(), calls


def test_ids_of_long_texts_are_kept_under_the_fingerprint_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("APT_CACHE", str(tmp_path))
    long = "abcd" * 40_000
    tokenizer, calls = counting("of its content")
    for text in (long, long, long[1:], "abc"):
        ids = tokenize(tokenizer, text, cache_from=4)
        assert ids.tolist() == list(text.encode())
    sample = long[: 1 << 16]
    assert calls == [long, sample, sample, long[1:], long[1 : 1 + (1 << 16)], "abc"]
    # Without a fingerprint, or with another one, kept ids are not those of the tokenizer.
    for fingerprint in (None, "of other content"):
        tokenizer, calls = counting(fingerprint, shift=1)
        assert tokenize(tokenizer, long, cache_from=4)[0] == ord("b") and calls[0] == long
    assert not caplog.records
    # A fingerprint that left something out.
    tokenizer, calls = counting("of its content", shift=2)
    assert tokenize(tokenizer, long, cache_from=4)[0] == ord("c") and calls[-1] == long
    assert "leaves something out" in caplog.text


def test_the_hash_of_ids_is_that_of_their_numbers():
    numbers = np.arange(300)
    hashes = {ids_sha256(numbers.astype(kind)) for kind in (np.int64, np.uint16, np.uint32)}
    assert len(hashes) == 1
    ones, joined = np.array([1, 1], np.uint8), np.array([257], np.uint16)
    assert ones.tobytes() == joined.tobytes()
    others = [numbers[::-1], numbers[:-1], ones, joined, ones[:0], ones * 0]
    assert len(hashes | {ids_sha256(ids) for ids in others}) == 7


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([3, 256]), "ids from 3 to 256, of a vocabulary of 256"),
        (np.array([-1, 3]), "ids from -1 to 3"),
        (np.array([0.5]), "no 1-D array of whole numbers"),
        (np.array([[1]]), "no 1-D array"),
        ([1, 2], "a list that is no"),
    ],
)
def test_what_are_no_ids_is_refused(ids, message):
    class Wrong(ByteTokenizer):
        def encode_array(self, text):
            return ids

    with pytest.raises(ConfigError, match=f"data.tokenizer_name: .*Wrong.*{message}"):
        tokenize(Wrong(), "text")
