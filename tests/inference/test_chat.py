"""A conversation is remembered turn by turn, kept in a file, and shown to the model as it was
trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the package of the engine is imported with torch")

from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.data.tokenizers.chat import ChatTemplate
from apt_core.errors import ConfigError
from apt_core.inference.chat import (
    FORMATS,
    Conversation,
    Said,
    encoded,
    fitting,
    format_called,
    format_for,
    has_template,
)
from apt_core.providers.documents import Document
from apt_core.providers.tokenizer import TokenizerProvider
from apt_core.types import Message


class Plain(TokenizerProvider):
    """A tokenizer without tokens for turns."""

    name = "plain"
    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Any) -> str:
        return bytes(ids).decode(errors="replace")


def talk(*turns: tuple[str, str], system: str = "") -> Conversation:
    found = Conversation(system)
    for user, answer in turns:
        found.ask(user)
        found.answer(answer)
    return found


def test_turns_are_taken_back_whole() -> None:
    found = talk(("a", "b"), ("c", "d"), system="s")
    found.ask("e")
    assert [message.content for message in found.messages(1)] == ["s", "c", "d", "e"]
    assert found.undo() == "e" and found.take_back_answer()
    assert [message.content for message in found.messages()] == ["s", "a", "b", "c"]
    assert found.undo() == "c" and found.undo() == "a" and found.undo() is None
    assert not found.take_back_answer() and found.messages() == (Message("system", "s"),)


def test_a_conversation_comes_back_from_its_file(tmp_path: Path) -> None:
    found = talk(("hé 字\n", "\x1b[2J\u202e"), system="sys")
    found.ask("go on")
    found.answer("1 2", "interrupted")
    path = tmp_path / "kept.json"
    found.save(path, {"settings": {"seed": 3}})
    assert "hé 字" in path.read_text(encoding="utf-8")
    assert Conversation.load(path) == found
    found.undo()
    found.save(path, {})  # over what it has written
    assert len(Conversation.load(path).said) == 2
    empty = tmp_path / "empty.json"
    Conversation().save(empty, {})
    assert Conversation.load(empty) == Conversation()
    # What documents hold is a conversation too.
    empty.write_text('{"messages": [{"role": "tool", "content": "x", "finish_reason": 3}]}')
    assert Conversation.load(empty).said == [Said(Message("tool", "x"))]


def test_what_is_no_conversation_is_refused_and_not_replaced(tmp_path: Path) -> None:
    bad: dict[str, bytes] = {
        "is not UTF-8": b'{"messages": "\xff"}',
        "no JSON object with 'messages'": b"[]",
        "no JSON object with 'messages' ": b'{"role": "user"}',
        "not a list": b'{"messages": "text"}',
        "has no 'role' and 'content'": b'{"messages": [{"role": "user"}]}',
        "unknown role 'usr'": b'{"messages": [{"role": "usr", "content": ""}]}',
        "int, not a string": b'{"messages": [{"role": "user", "content": 3}]}',
        "lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "nested too deep": b"[" * 100_000,
        "Expecting": b"",
    }
    path = tmp_path / "bad.json"
    for expected, data in bad.items():
        path.write_bytes(data)
        with pytest.raises(ConfigError) as refused:
            Conversation.load(path)
        assert expected.strip() in str(refused.value), refused.value
        with pytest.raises(ConfigError, match="is no conversation: it is not replaced"):
            talk(("a", "b")).save(path, {})
        assert path.read_bytes() == data
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match="the conversation cannot be read"):
            Conversation.load(missing)
    with pytest.raises(ConfigError, match="the conversation cannot be written: No such file"):
        talk(("a", "b")).save(tmp_path / "none" / "a.json", {})


def test_the_format_is_that_of_what_the_model_was_trained_on() -> None:
    byte, plain = ByteTokenizer(), Plain()
    assert has_template(byte) and not has_template(plain)
    cases: list[tuple[dict[str, int], str, str]] = [
        ({}, "template", "dialogue"),
        ({"conversation": 1, "text": 900}, "template", "dialogue"),
        ({"pair": 2, "text": 900}, "pairs", "pairs"),
        ({"text": 9}, "text", "text"),
    ]
    for forms, with_template, without in cases:
        assert format_for(byte, forms).name == with_template
        assert format_for(plain, forms).name == without
    with pytest.raises(ConfigError, match="there is no format 'templat' \\(did you mean"):
        format_called("templat")


def test_each_format_shows_the_model_what_it_knows() -> None:
    found = talk(("one", " two"), system="be kind")
    found.ask("three")
    shown = {name: each.render(found.messages()) for name, each in FORMATS.items()}
    assert shown["template"] == found.messages()
    assert shown["dialogue"] == "be kind\nUser: one\nAssistant:  two\nUser: three\nAssistant:"
    assert shown["text"] == "be kind\none two\nthree"
    # The ids of a pair are those before the response in training.
    found.system = ""
    pair = FORMATS["pairs"].render(found.messages())
    ids = ByteTokenizer().encode_prompt(Document(prompt="three", response="four"))
    assert isinstance(pair, str) and ByteTokenizer().encode(pair) == ids


@pytest.mark.parametrize("name", ["dialogue", "pairs", "text"])
def test_other_programs_are_told_the_same_form(name: str) -> None:
    pytest.importorskip("jinja2", reason="what renders templates is not installed")
    template = ChatTemplate(FORMATS[name].jinja, {"eos_token": "<eos>"})
    talks = [
        talk(),
        talk(system="be kind"),
        talk(("one", " two"), ("lines\n", "end\n"), system="{{ braces }}\n"),
        talk(("", ""), ("é 字 😀", "\n\n")),
    ]
    for found in talks:
        for question in ("three", "", "ends\n", "two\n\nlines"):
            found.ask(question)
            messages = found.messages()
            assert template.prompt(messages) == FORMATS[name].render(messages)
            found.undo()
    # As data to learn from, the answer and the end of it are what is learned.
    answered = template.pieces(talk(("three", "four")).messages())
    if name == "pairs":
        assert answered == [("three\n", False), ("four<eos>", True)]


@pytest.mark.parametrize("name", ["template", "dialogue", "text"])
def test_a_prompt_goes_on_from_the_one_before_and_its_answer(name: str) -> None:
    """So that the caches of the turns before serve again."""
    tokenizer, found = ByteTokenizer(), Conversation("be kind")
    before: list[int] = []
    for turn in range(3):
        found.ask(f"frage {turn} é")
        ids = encoded(tokenizer, FORMATS[name].render(found.messages()))
        assert ids[: len(before)] == before
        answer = f" antwort {turn}"
        before = [*ids, *tokenizer.encode(answer)]
        found.answer(answer.strip() if FORMATS[name].stripped else answer)


def test_the_first_turns_are_left_out_until_the_rest_fits() -> None:
    tokenizer = ByteTokenizer()
    found = talk(*[(f"question {n}", f"answer {n}") for n in range(9)], system="always here")
    found.ask("the last")
    whole, first = fitting(found, FORMATS["template"], tokenizer, 10_000)
    assert (whole, first) == (found.messages(), 0)
    for most in range(30, len(encoded(tokenizer, whole)), 7):
        prompt, first = fitting(found, FORMATS["template"], tokenizer, most)
        assert prompt == found.messages(first) and prompt[0] == Message("system", "always here")
        assert prompt[-1] == Message("user", "the last") and prompt[1].role == "user"
        assert len(encoded(tokenizer, prompt)) <= most or first == 9
        assert len(encoded(tokenizer, found.messages(first - 1))) > most
        # Turns that were left out do not come back by themselves.
        assert fitting(found, FORMATS["template"], tokenizer, 10_000, first)[1] == first
    alone, first = fitting(found, FORMATS["template"], tokenizer, 1)
    assert [message.content for message in alone] == ["always here", "the last"] and first == 9
    with pytest.raises(ConfigError, match="has no token for turns of 'system'"):
        fitting(found, FORMATS["template"], Plain(), 100)


def test_what_fits_of_a_long_conversation_is_found_from_its_end() -> None:
    """As if every turn had been tried from the first, by looking at little more than what fits."""
    looked: list[int] = []

    class Counts(Plain):
        def encode(self, text: str) -> list[int]:
            looked.append(len(text))
            return super().encode(text)

    tokenizer, form = Counts(), FORMATS["dialogue"]
    found = talk(*((f"{n}" * (n % 7), "yes") for n in range(300)), system="s")
    found.ask("the last")
    for most in (0, 40, 200, 1000, 10**9):
        for first in (0, 280, 300):
            fits = (
                turn
                for turn in range(first, len(found.turns))
                if len(encoded(Plain(), form.render(found.messages(turn)))) <= most
            )
            turn = next(fits, len(found.turns) - 1)
            looked.clear()
            prompt = form.render(found.messages(turn))
            assert fitting(found, form, tokenizer, most, first) == (prompt, turn), (most, first)
            assert most > 1000 or max(looked) < 3 * most + 200
