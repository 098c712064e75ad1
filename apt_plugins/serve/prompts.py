"""How a conversation becomes the prompt of this model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from apt_core import GenerationRequest, Message
from apt_core.inference.chat import ChatFormat, Conversation, Said, fitting
from apt_core.runs import Session


class Prompts:
    """Makes requests as ``apt-chat`` does: by a ``chat_format``, without the first turns of a
    conversation where it does not fit into the context beside its answer."""

    def __init__(self, session: Session, chat_format: ChatFormat) -> None:
        self._session, self.format = session, chat_format

    def of(self, requests: Sequence[GenerationRequest]) -> list[Callable[[], GenerationRequest]]:
        """Make each of ``requests``, which have one prompt; to be called where the tokenizer may be
        used. Raises ConfigError for what the tokenizer refuses."""

        @cache
        def first() -> GenerationRequest:
            return self._made(requests[0])

        def later(seed: int) -> Callable[[], GenerationRequest]:
            return lambda: replace(first(), seed=seed)

        return [later(request.seed) for request in requests]

    def _made(self, request: GenerationRequest) -> GenerationRequest:
        if isinstance(request.prompt, str):
            return request
        room = self._session.config.model.max_seq_len
        room -= min(request.max_new_tokens, room // 4)
        conversation = _conversation(request.prompt)
        prompt, _ = fitting(conversation, self.format, self._session.tokenizer, room)
        return replace(request, prompt=prompt, stop=(*request.stop, *self.format.stop))


def _conversation(messages: Sequence[Message]) -> Conversation:
    said = [Said(message) for message in messages]
    system = ""
    if said[0].message.role == "system":
        system = said.pop(0).message.content
    return Conversation(system, said)


class Stripped:
    """A text that comes in pieces, without the white space around it."""

    def __init__(self) -> None:
        self._held = ""
        self._begun = False

    def add(self, piece: str) -> str:
        """What can be told."""
        text = self._held + (piece if self._begun else piece.lstrip())
        told = text.rstrip()
        self._held = text[len(told) :]
        self._begun = self._begun or bool(told)
        return told
