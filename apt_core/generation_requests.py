"""What a generation may be asked for. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from apt_core.errors import ConfigError, Problem
from apt_core.plain_values import MAX_TEXT
from apt_core.providers.documents import ROLES
from apt_core.types import GenerationRequest, Message

MAX_NEW_TOKENS = 1 << 20
MAX_STOPS = 64
MAX_STOP_LENGTH = 4096
MAX_LOGPROBS = 1000


def check_request(request: GenerationRequest) -> GenerationRequest:
    """``request`` with sequences as tuples. Raises ConfigError with every problem, each under the
    name of its field."""
    if problems := list(_problems(request)):
        raise ConfigError(problems)
    prompt = request.prompt if isinstance(request.prompt, str) else tuple(request.prompt)
    return replace(request, prompt=prompt, stop=tuple(request.stop), sources=tuple(request.sources))


def _problems(request: GenerationRequest) -> Iterator[Problem]:
    yield from _prompt(request.prompt)
    yield from _number("max_new_tokens", request.max_new_tokens, int, 1, MAX_NEW_TOKENS)
    yield from _number(
        "temperature", request.temperature, float, 0, 1e6, hint="0 takes the most likely token"
    )
    yield from _number("top_k", request.top_k, int, 0, 1 << 31, hint="0 keeps all tokens")
    yield from _number("top_p", request.top_p, float, 0, 1, open_=True, hint="1 keeps all tokens")
    yield from _number("min_p", request.min_p, float, 0, 1, hint="0 keeps all tokens")
    yield from _number(
        "repetition_penalty",
        request.repetition_penalty,
        float,
        0,
        1e6,
        open_=True,
        hint="1 leaves the logits as they are",
    )
    yield from _number("seed", request.seed, int, -(1 << 63), (1 << 64) - 1)
    if request.logprobs is not None:
        yield from _number("logprobs", request.logprobs, int, 0, MAX_LOGPROBS)
    yield from _stops(request.stop)


def _number(
    key: str,
    value: Any,
    kind: type[int] | type[float],
    least: float,
    most: float,
    *,
    open_: bool = False,
    hint: str = "",
) -> Iterator[Problem]:
    """``open_``: ``least`` itself is not allowed."""
    accepted = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted):
        what = "a whole number" if kind is int else "a number"
        yield Problem(f"is {value!r}, not {what}", key, hint=hint)
    elif not math.isfinite(value) or not least <= value <= most or (open_ and value == least):
        form = ",d" if kind is int else "g"
        bounds = f"{'above' if open_ else 'from'} {least:{form}} to {most:{form}}"
        yield Problem(f"is {value}, not {bounds}", key, hint=hint)


def _stops(stops: Any) -> Iterator[Problem]:
    if isinstance(stops, str) or not isinstance(stops, list | tuple):
        yield Problem(f"is {stops!r}, not a list of strings", "stop", hint='stop=["\\n"]')
        return
    if len(stops) > MAX_STOPS:
        yield Problem(f"has {len(stops)} strings, more than {MAX_STOPS}", "stop")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            hint = "an empty string would stop every text at once"
            yield Problem(f"has {stop!r}, not a string with characters", "stop", hint=hint)
        elif len(stop) > MAX_STOP_LENGTH:
            yield Problem(f"has a string of more than {MAX_STOP_LENGTH} characters", "stop")


def _prompt(prompt: Any) -> Iterator[Problem]:
    if isinstance(prompt, str):
        yield from _text("prompt", prompt)
        return
    if not isinstance(prompt, list | tuple):
        what = type(prompt).__name__
        yield Problem(f"is a {what}, not a text or a list of messages", "prompt")
        return
    if not prompt:
        hint = "give the turns of a conversation, or a text"
        yield Problem("has no messages", "prompt", hint=hint)
    for number, message in enumerate(prompt, 1):
        content: Any = getattr(message, "content", None)
        if not isinstance(message, Message):
            what = type(message).__name__
            yield Problem(f"message {number} is a {what}, not a Message", "prompt")
        elif message.role not in ROLES:
            hint = f"there are {', '.join(ROLES)}"
            yield Problem(f"message {number} has the role {message.role!r}", "prompt", hint=hint)
        elif not isinstance(content, str):
            what = type(content).__name__
            yield Problem(f"the content of message {number} is a {what}, not a text", "prompt")
        else:
            yield from _text("prompt", content)


def _text(key: str, text: str) -> Iterator[Problem]:
    if len(text) > MAX_TEXT:
        yield Problem(f"has {len(text):,} characters, more than {MAX_TEXT:,}", key)
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = ord(text[error.start])
        yield Problem(f"holds a lone surrogate (\\u{surrogate:04x}), which is no text", key)
