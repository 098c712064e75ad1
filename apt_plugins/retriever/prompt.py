"""Puts passages into a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from apt_core import GenerationRequest, Message, RewrittenPrompt, Source
from apt_core.providers import RetrievedChunk

BETWEEN = "\n\n"
"""Stands between passages, and between the last of them and the question."""

QUESTION_CHARS = 1000


def question_of(request: GenerationRequest) -> str:
    """What is searched for: the end of the prompt, or in a conversation that of the last turn of
    the user; at most QUESTION_CHARS."""
    text = request.prompt
    if not isinstance(text, str):
        text = next((m.content for m in reversed(text) if m.role == "user"), "")
    return text[-QUESTION_CHARS:]


def with_passages(
    request: GenerationRequest,
    chunks: Sequence[RetrievedChunk],
    room: int,
    length_of: Callable[[str], int],
) -> RewrittenPrompt | None:
    """The prompt with those of ``chunks``, the best first, that have at most ``room`` tokens
    together; ``length_of`` counts them. One that has no room makes way for shorter ones. None if
    there is no room for any.

    The passages stand before the prompt, or in a conversation before the last turn of the user,
    within it; the best stands last, next to the question.
    """
    taken: list[RetrievedChunk] = []
    for chunk in chunks:
        length = length_of(chunk.text + BETWEEN)
        if length <= room:
            room -= length
            taken.append(chunk)
    if not taken:
        return None
    passages = "".join(chunk.text + BETWEEN for chunk in reversed(taken))
    prompt: str | list[Message]
    if isinstance(request.prompt, str):
        prompt = passages + request.prompt
    else:
        prompt = list(request.prompt)
        at = max(n for n, message in enumerate(prompt) if message.role == "user")
        prompt[at] = replace(prompt[at], content=passages + prompt[at].content)
    return RewrittenPrompt(prompt, [_source(chunk) for chunk in taken])


def _source(chunk: RetrievedChunk) -> Source:
    path, _, line = chunk.source.rpartition(":")
    if path and line.isdecimal():
        return Source(path, int(line), chunk.text, chunk.score)
    return Source(chunk.source, 1, chunk.text, chunk.score)
