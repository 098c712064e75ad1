"""Modelfiles, as Ollama reads them."""

from __future__ import annotations

from typing import Any

import pytest

from apt_core.data.tokenizers.chat import CHAT_TEMPLATE
from apt_core.inference.chat import FORMATS
from apt_core.providers import SpecialTokens
from apt_plugins.export.gguf.modelfile import GO_TEMPLATES, modelfile, quoted
from apt_plugins.export.tokenizers import BEGINNINGS

COMMANDS = {"FROM", "TEMPLATE", "PARAMETER"}


def unquoted(text: str) -> str | None:
    """The value without its quotes; None as long as they are open."""
    for mark in ('"""', '"'):
        if text.startswith(mark):
            ended = len(text) >= 2 * len(mark) and text.endswith(mark)
            return text[len(mark) : -len(mark)] if ended else None
    return text


def read(text: str) -> list[tuple[str, str]]:
    """The commands of a Modelfile by Ollama's rules: a word, of PARAMETER a second one, and a value
    up to the end of the line at which its quotes are closed, of which only printable characters,
    white space and what stands in open quotes are kept."""
    found, rest = [], text
    while rest := rest.lstrip(" \t\r\n"):
        word, _, rest = rest.partition(" ")
        assert word in COMMANDS, word
        if word == "PARAMETER":
            word, _, rest = rest.partition(" ")
            assert word.replace("_", "").isalnum() and word.isascii()
        held = ""
        for number, letter in enumerate(rest):
            if letter in "\r\n" and unquoted(held.strip()) is not None:
                rest = rest[number:]
                break
            held += letter if letter.isprintable() or letter in "\t\r\n" else ""
        else:
            rest = ""
        value = unquoted(held.strip())
        assert value is not None, f"open quotes: {held}"
        found.append((word, value))
    return found


def commands(names: dict[int, str], template: str | None = None) -> list[tuple[str, str]]:
    ends: Any = dict(zip(("eos", "end"), names, strict=False))
    special = SpecialTokens(**ends, names=names)
    return read(modelfile("model.gguf", special, template, 64))


BEGIN = [("FROM", "./model.gguf"), ("num_ctx", "64")]


@pytest.mark.parametrize(
    "text",
    [
        "<|end|>", "</s>", "<｜end▁of▁sentence｜>", 'a"b', '"', '""', '"""', '"a"', 'a"', '"a',
        'x""" y', " ", "  two  ", "#no comment", "FROM elsewhere", "\\n", "{{ .System }}", "👍",
    ],
)  # fmt: skip
def test_a_text_at_which_to_stop_is_read_as_it_is(text: str) -> None:
    assert commands({0: text, 1: "<|end|>"}) == [
        *BEGIN,
        *(("stop", each) for each in dict.fromkeys([text, "<|end|>"])),
    ]


@pytest.mark.parametrize(
    "text", ['x"\nFROM elsewhere', "a\nb", "\r", "a\u200bb", "a\u3000b", "\x00"]
)
def test_what_ollama_would_read_as_another_text_is_left_out(text: str) -> None:
    assert commands({0: text, 1: "<|end|>"}) == [*BEGIN, ("stop", "<|end|>")]


@pytest.mark.parametrize("begin", ["", BEGINNINGS[0]])
def test_templates_of_the_core_are_translated(begin: str) -> None:
    for each in FORMATS.values():
        template = each.jinja or CHAT_TEMPLATE
        found = commands({0: "<|eos|>"}, begin + template)
        assert found == [*BEGIN, ("stop", "<|eos|>"), ("TEMPLATE", GO_TEMPLATES[template])]
        assert quoted(GO_TEMPLATES[template]) is not None
    for foreign in ("{{ messages }}", None):
        assert commands({0: "<|eos|>"}, foreign) == [*BEGIN, ("stop", "<|eos|>")]
