from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_core.data.tokenizers.byte import ByteTokenizer

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
