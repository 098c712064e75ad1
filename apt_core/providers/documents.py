"""Documents: what sources of data yield and tokenizers encode."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from apt_core.errors import did_you_mean
from apt_core.types import Message as Message

ROLES = ("system", "user", "assistant", "tool")
"""Who may speak in a conversation."""

LEARNED_ROLE = "assistant"
"""Whose turns are learned."""

TEXT, PAIR, CONVERSATION = FORMS = ("text", "pair", "conversation")
"""What a document may be."""

_FIELDS = "'text', 'prompt' and 'response', or 'messages'"


@dataclass(frozen=True, slots=True)
class Document:
    """A text, a prompt with its response, or a conversation: exactly one of ``text``, ``prompt``
    with ``response``, and ``messages``.

    ``where`` says where it was read, as ``file.jsonl:17``. Documents of one ``key`` stand on one
    side of the split into training and validation; without a key their content decides. A text that
    comes in pieces ``begins`` with the first and ``ends`` with the last of them: the others have no
    bos and no eos.

    >>> Document.of({"prompt": "2 + 2 =", "response": "4"}).content
    '["2 + 2 =","4"]'
    """

    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: tuple[Message, ...] = ()
    where: str = ""
    key: str | None = None
    begins: bool = True
    ends: bool = True

    @classmethod
    def of(cls, value: Document | str | Mapping[str, Any], where: str = "") -> Document:
        """The document that ``value`` stands for: itself, a text, or a mapping with the fields of a
        document, of which ``messages`` is a list of ``{"role": …, "content": …}``.

        Keys that are no fields are left alone. Raises ValueError for anything else.
        """
        if isinstance(value, str):
            return cls(text=_text(value, "the text"), where=where)
        if isinstance(value, Document):
            found = value if value.where or not where else replace(value, where=where)
        elif isinstance(value, Mapping):
            found = cls._of_mapping(value, where)
        else:
            raise ValueError(f"is {_kind_of(value)}, not a document")
        if (found.text is not None) + (found.prompt is not None) + bool(found.messages) != 1 or (
            found.prompt is None
        ) != (found.response is None):
            raise ValueError(f"has not exactly one of {_FIELDS}")
        return found

    @classmethod
    def _of_mapping(cls, value: Mapping[str, Any], where: str) -> Document:
        key = value.get("key")
        found = cls(where=where, key=None if key is None else str(key))
        if value.get("messages") is not None:
            return replace(found, messages=tuple(_messages(value["messages"])))
        if value.get("prompt") is not None and value.get("response") is not None:
            return replace(
                found,
                prompt=_text(value["prompt"], "'prompt'"),
                response=_text(value["response"], "'response'"),
            )
        if value.get("text") is not None:
            return replace(found, text=_text(value["text"], "'text'"))
        names = ", ".join(repr(str(name)) for name in value)
        raise ValueError(f"has neither {_FIELDS}; it has {names or 'nothing'}")

    @property
    def form(self) -> str:
        """One of FORMS."""
        return TEXT if self.text is not None else CONVERSATION if self.messages else PAIR

    @property
    def parts(self) -> Sequence[str]:
        """All its texts, in order."""
        if self.text is not None:
            return (self.text,)
        if self.prompt is not None and self.response is not None:
            return self.prompt, self.response
        return [message.content for message in self.messages]

    @property
    def content(self) -> str:
        """One text that two documents share only if they say the same."""
        if self.text is not None:
            return self.text
        parts: Any = self.parts
        if self.messages:
            parts = [[message.role, message.content] for message in self.messages]
        return json.dumps(parts, ensure_ascii=False, separators=(",", ":"))

    @property
    def num_chars(self) -> int:
        """The characters of all its texts."""
        return sum(map(len, self.parts))

    def with_texts(self, texts: Iterable[str]) -> Document:
        """The same document with ``texts`` in place of its :attr:`parts`."""
        new = iter(texts)
        if self.text is not None:
            return replace(self, text=next(new))
        if self.prompt is not None:
            return replace(self, prompt=next(new), response=next(new))
        return replace(
            self, messages=tuple(replace(message, content=next(new)) for message in self.messages)
        )


def _messages(value: Any) -> Iterator[Message]:
    if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
        raise ValueError(f"'messages' is {_kind_of(value)}, not a list")
    found = list(value)
    if not found:
        raise ValueError("'messages' is empty")
    for number, message in enumerate(found, 1):
        if isinstance(message, Message):
            message = {"role": message.role, "content": message.content}
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {number} has no 'role' and 'content'")
        role = message["role"]
        if role not in ROLES:
            hint = did_you_mean(str(role), ROLES) or f"there are {', '.join(ROLES)}"
            raise ValueError(f"message {number} has the unknown role {role!r} ({hint})")
        yield Message(role, _text(message["content"], f"message {number}"))


def _kind_of(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_kind_of(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds a lone surrogate (\\u{ord(value[error.start]):04x}), which is no text"
        ) from None
    return value
