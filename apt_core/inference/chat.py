"""Conversations with a model: what was said, what of it the model sees, and the file it is kept
in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apt_core.errors import ConfigError, did_you_mean
from apt_core.files import read_file, write_atomically
from apt_core.json_files import parse_json
from apt_core.providers.documents import (
    CONVERSATION,
    LEARNED_ROLE,
    PAIR,
    TEXT,
    Document,
    Message,
)
from apt_core.providers.tokenizer import BETWEEN, TokenizerProvider
from apt_core.runs.session import Session
from apt_core.runs.trained_on import data_row, forms_of
from apt_core.types import GenerationRequest

MAX_FILE = 64 << 20
"""The most bytes of a kept conversation."""

Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class Said:
    """A message of a conversation. ``finish_reason`` says how an answer ended, if it was not by
    itself: ``length`` or ``interrupted``."""

    message: Message
    finish_reason: str = ""


@dataclass
class Conversation:
    """Messages in their order. A turn is a message of the user with all that follows it up to the
    next one. ``system`` comes before them, empty for none."""

    system: str = ""
    said: list[Said] = field(default_factory=list)

    @property
    def turns(self) -> list[int]:
        """Where in ``said`` each turn begins."""
        return [n for n, each in enumerate(self.said) if each.message.role == "user"]

    def ask(self, text: str) -> None:
        """Add a message of the user."""
        self.said.append(Said(Message("user", text)))

    def answer(self, text: str, finish_reason: str = "") -> None:
        """Add the model's answer."""
        self.said.append(Said(Message(LEARNED_ROLE, text), finish_reason))

    def undo(self) -> str | None:
        """Take the last turn back; returns what the user had said, None where there is no turn."""
        if not self.turns:
            return None
        begin = self.turns[-1]
        text = self.said[begin].message.content
        del self.said[begin:]
        return text

    def take_back_answer(self) -> bool:
        """Take back what follows the user's last message; returns whether there is one."""
        if not self.turns:
            return False
        del self.said[self.turns[-1] + 1 :]
        return True

    def messages(self, first_turn: int = 0) -> tuple[Message, ...]:
        """The system message and the turns from ``first_turn`` on. What was said before the first
        turn belongs to it."""
        begin = self.turns[first_turn] if first_turn else 0
        system = (Message("system", self.system),) if self.system else ()
        return (*system, *(each.message for each in self.said[begin:]))

    def save(self, path: Path, more: Mapping[str, Any]) -> None:
        """Write the conversation to a file, with ``more`` beside its ``messages``.

        Raises ConfigError for a file that is there and holds something else, and for one that
        cannot be written.
        """
        if path.exists():
            try:
                self.load(path)
            except ConfigError:
                message = "is there, and is no conversation: it is not replaced"
                raise ConfigError(message, where=str(path), hint="give another name") from None
        rows: list[dict[str, str]] = []
        for each in (*self._system(), *self.said):
            row = {"role": each.message.role, "content": each.message.content}
            rows.append(row | ({"finish_reason": each.finish_reason} if each.finish_reason else {}))
        text = json.dumps({**more, "messages": rows}, indent=2, ensure_ascii=False)
        try:
            write_atomically(path, text + "\n")
        except OSError as error:
            message = f"the conversation cannot be written: {error.strerror}"
            raise ConfigError(message, where=str(path)) from error

    def _system(self) -> Iterable[Said]:
        return [Said(Message("system", self.system))] if self.system else []

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """The conversation in a file: one that :meth:`save` has written, or any JSON object with
        ``messages`` as documents have them.

        Raises ConfigError for anything else.
        """
        try:
            value = parse_json(read_file(path, MAX_FILE).decode("utf-8-sig"))
            if not isinstance(value, dict) or "messages" not in value:
                raise ValueError("it is no JSON object with 'messages'")
            rows = value["messages"]
            messages = Document.of({"messages": rows}).messages if rows != [] else ()
        except OSError as error:
            message = f"the conversation cannot be read: {error.strerror}"
            raise ConfigError(message, where=str(path)) from error
        except UnicodeDecodeError as error:
            message = f"is no conversation: byte {error.start} is not UTF-8"
            raise ConfigError(message, where=str(path)) from error
        except ValueError as error:
            raise ConfigError(f"is no conversation: {error}", where=str(path)) from error
        reasons = [row.get("finish_reason") for row in rows]
        said = [
            Said(message, reason if isinstance(reason, str) else "")
            for message, reason in zip(messages, reasons, strict=True)
        ]
        system = ""
        if said and said[0].message.role == "system":
            system = said.pop(0).message.content
        return cls(system, said)


# What the model sees ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation becomes a prompt, and in ``jinja`` the same for other programs, after what
    begins a text (empty where it is the tokenizer's template). ``notice`` tells the user what to
    expect, where that is not a chat. An answer ends before one of ``stop``; the model ``ends`` it
    by itself, or could go on for ever; of one that is ``stripped`` the white space around it is no
    part."""

    name: str
    render: Callable[[Sequence[Message]], Prompt]
    jinja: str = ""
    notice: str = ""
    stop: tuple[str, ...] = ()
    ends: bool = True
    stripped: bool = False


def _dialogue(messages: Sequence[Message]) -> str:
    lines = [
        message.content
        if message.role == "system"
        else f"{message.role.title()}: {message.content}"
        for message in messages
    ]
    return "\n".join([*lines, "Assistant:"])


def _pair(messages: Sequence[Message]) -> str:
    """The system message, if there is one, and the last message of the user."""
    begin = [message.content for message in messages if message.role == "system"]
    return "".join(text + BETWEEN for text in [*begin, messages[-1].content])


def _text(messages: Sequence[Message]) -> str:
    """What the user writes begins a new line, and the answer continues it."""
    text = ""
    for message in messages:
        new_line = message.role != LEARNED_ROLE and text and not text.endswith("\n")
        text += ("\n" if new_line else "") + message.content
    return text


_BETWEEN = f"{{{{ {BETWEEN!r} }}}}"
_ANSWERED = "messages[-1].role == 'assistant' and not add_generation_prompt"
_ANSWER = "{% generation %}{{ messages[-1].content }}{{ eos_token }}{% endgeneration %}"

DIALOGUE_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role != 'system' %}{{ message.role | capitalize }}: {% endif %}"
    "{{ message.content }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

PAIRS_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}"
    f"{{{{ message.content }}}}{_BETWEEN}"
    "{% endif %}{% endfor %}"
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    f"{{% if asked %}}{{{{ asked[-1].content }}}}{_BETWEEN}{{% endif %}}"
    f"{{% if {_ANSWERED} %}}{_ANSWER}{{% endif %}}"
)

TEXT_TEMPLATE = (
    "{% set said = namespace(end='\\n') %}{% for message in messages %}"
    "{% if message.role != 'assistant' and said.end != '\\n' %}{{ '\\n' }}{% endif %}"
    "{{ message.content }}"
    "{% if message.content %}{% set said.end = message.content[-1] %}{% endif %}{% endfor %}"
)

FORMATS = {
    each.name: each
    for each in (
        ChatFormat("template", tuple),
        ChatFormat(
            "dialogue",
            _dialogue,
            DIALOGUE_TEMPLATE,
            "the tokenizer has no chat template: the model sees lines of User: and Assistant:",
            ("\nUser:", "\nSystem:"),
            stripped=True,
        ),
        ChatFormat(
            "pairs",
            _pair,
            PAIRS_TEMPLATE,
            "this model was trained on single prompts with a response: it sees your last message "
            "alone, not the conversation",
        ),
        ChatFormat(
            "text",
            _text,
            TEXT_TEMPLATE,
            "this model was trained on plain text: it continues what you write rather than "
            "answering it",
            ends=False,
        ),
    )
}
"""By name: the tokenizer's chat template; lines with who speaks; a prompt before its response, as
documents of that form have it; text that is continued."""


def format_for(tokenizer: TokenizerProvider, forms: Mapping[str, int]) -> ChatFormat:
    """The format for a model that was trained on documents of these ``forms``, by their number:
    the template where conversations are among them or nothing is known, and the tokenizer has one.
    """
    if forms.get(CONVERSATION) or not (forms.get(PAIR) or forms.get(TEXT)):
        return FORMATS["template" if has_template(tokenizer) else "dialogue"]
    return FORMATS["pairs" if forms.get(PAIR) else "text"]


def format_of(session: Session) -> ChatFormat:
    """The format for the model of ``session``, by what its run records of its data."""
    data = {} if session.checkpoint is None else data_row(session.checkpoint)
    return format_for(session.tokenizer, forms_of(data))


def in_format(chat_format: ChatFormat, request: GenerationRequest) -> GenerationRequest:
    """``request`` with the prompt of its conversation; a text stays."""
    if isinstance(request.prompt, str):
        return request
    prompt = chat_format.render(request.prompt)
    return replace(request, prompt=prompt, stop=(*request.stop, *chat_format.stop))


def format_called(name: str, key: str = "--format") -> ChatFormat:
    """The format of this name. Raises ConfigError, of ``key``, if there is none."""
    if name not in FORMATS:
        hint = did_you_mean(name, FORMATS) or f"there are {', '.join(FORMATS)}"
        raise ConfigError(f"there is no format {name!r}", key=key, hint=hint)
    return FORMATS[name]


def has_template(tokenizer: TokenizerProvider) -> bool:
    """Whether the tokenizer encodes conversations."""
    if tokenizer.chat_template is not None:
        return True
    try:
        tokenizer.encode_prompt(Document(messages=(Message("user", "a"),)))
    except ValueError:
        return False
    return True


def encoded(tokenizer: TokenizerProvider, prompt: Prompt) -> list[int]:
    """The ids of a prompt. Raises ValueError where the tokenizer refuses it."""
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(Document(text=prompt))
    return tokenizer.encode_prompt(Document(messages=prompt))


def fitting(
    conversation: Conversation,
    chat_format: ChatFormat,
    tokenizer: TokenizerProvider,
    most: int,
    first_turn: int = 0,
) -> tuple[Prompt, int]:
    """The prompt of a conversation that ends with the user's message, in at most ``most`` tokens:
    without the turns before the first that fits, ``first_turn`` or a later one, which is given
    too. The system message and the last turn stay, even if they are longer.

    Raises ConfigError where the tokenizer refuses the conversation.
    """
    last = len(conversation.turns) - 1

    def prompt_from(turn: int) -> tuple[Prompt, bool]:
        prompt = chat_format.render(conversation.messages(turn))
        return prompt, len(encoded(tokenizer, prompt)) <= most

    try:
        if first_turn >= last:
            return prompt_from(first_turn)[0], max(0, first_turn)
        # From the end, so that it costs what the context holds rather than what was ever said.
        found, too_early, back = (prompt_from(last)[0], last), first_turn - 1, 1
        while too_early < found[1] - 1:
            turn = max(found[1] - back, first_turn) if back else (too_early + found[1]) // 2
            prompt, fits = prompt_from(turn)
            if fits:
                found, back = (prompt, turn), 2 * back
            else:
                too_early, back = turn, 0
        return found
    except ValueError as error:
        raise ConfigError(str(error)) from error
