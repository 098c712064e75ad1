"""What every tokenizer must do."""

from __future__ import annotations

from typing import Any

import numpy as np

from apt_core.testing.conformance.checks import Check, refusing

TEXTS = (
    "",
    "Plain text: 3.14, twice  spaced.",
    "\tindented\r\nnext line\n\n\x00\x7f ",
    "café, e\u0301 and \u00e9, Ωμέγα, ligature \ufb01",
    "学而时习之，不亦说乎？ 日本語 한국어",
    "👩‍👩‍👧‍👦 🇫🇷 👍🏽",
    "\u202eright to left\u202c, \u200b, \ufeff, \ufffd, \ue000, \U0010ffff",
    "<|endoftext|> <s> [PAD] ##ing ▁x Ġy",
)
"""Where tokenizers lose text: white space, composition, rare characters, their own markers."""


def tokenizer_checks(provider: Any) -> list[Check]:
    """The checks of a tokenizer; the provider is the tokenizer."""
    return [
        Check("builds", lambda: _vocabulary(provider)),
        Check("round trip", lambda: _round_trip(provider)),
        Check("ids", lambda: _ids(provider)),
        Check("any ids", lambda: _any_ids(provider)),
        Check("lone surrogates", lambda: _lone_surrogates(provider)),
        Check("arrays", lambda: _arrays(provider)),
        Check("fingerprint", lambda: _fingerprint(provider)),
    ]


def _vocabulary(tokenizer: Any) -> None:
    size = tokenizer.vocab_size
    assert isinstance(size, int) and size > 0, f"vocab_size is {size!r}"


def _round_trip(tokenizer: Any) -> None:
    for text in TEXTS:
        again = tokenizer.decode(tokenizer.encode(text))
        assert again == text, f"{text!a} comes back as {again!a}"


def _ids(tokenizer: Any) -> None:
    """A list of ints below vocab_size, the same every time."""
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert isinstance(ids, list), f"encode gives a {type(ids).__name__}, not a list"
        strangers = [i for i in ids if type(i) is not int or not 0 <= i < tokenizer.vocab_size]
        assert not strangers, f"{strangers[:3]} among the ids of {text!a}"
        assert tokenizer.encode(text) == ids, f"encoding {text!a} twice gives other ids"


def _any_ids(tokenizer: Any) -> None:
    """A model may sample any sequence of ids: decode never raises."""
    rng = np.random.default_rng(0)
    for _ in range(64):
        ids = rng.integers(tokenizer.vocab_size, size=16).tolist()
        text = tokenizer.decode(ids)
        assert isinstance(text, str), f"decode gives a {type(text).__name__}"
        text.encode("utf-8")


def _lone_surrogates(tokenizer: Any) -> None:
    with refusing("a lone surrogate, which is no text"):
        tokenizer.encode("a\ud800b")


def _arrays(tokenizer: Any) -> None:
    """``encode_array`` gives the ids of ``encode``, in a type that holds every id."""
    for text in TEXTS:
        array = tokenizer.encode_array(text)
        assert array.ndim == 1 and array.dtype.kind == "u", f"{array.dtype} {array.shape}"
        assert np.iinfo(array.dtype).max >= tokenizer.vocab_size - 1, f"ids end at {array.dtype}"
        assert array.tolist() == tokenizer.encode(text), f"other ids for {text!a} than encode"


def _fingerprint(tokenizer: Any) -> None:
    """None, or text that is the same every time: long texts are kept as ids under it."""
    tell = getattr(tokenizer, "fingerprint", lambda: None)
    found, again = tell(), tell()
    assert found is None or (isinstance(found, str) and found), f"fingerprint is {found!r}"
    assert found == again, f"fingerprint is {found!r}, and then {again!r}"
