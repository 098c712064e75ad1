"""From the body of a request to what it asks for. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apt_core import ConfigError, GenerationRequest, Message
from apt_core.errors import did_you_mean
from apt_core.generation_requests import check_request
from apt_plugins.serve.api_errors import ApiError
from apt_plugins.serve.limits import Limits

COMPLETION_TOKENS = 16
"""The most tokens of a completion that says nothing of it, as the protocol has it."""

IGNORED = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
"""Parameters that change no answer."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Parameters that are not offered, with the values that ask for nothing."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class Body(BaseModel):
    """What both kinds of requests may have. Ranges are checked by what generates."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str = ""
    n: int = Field(default=1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | list[str] = Field(default_factory=list)
    seed: int | None = None


class CompletionBody(Body):
    prompt: str | list[str]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]

    def message(self) -> Message:
        """It as the tokenizer's template takes it."""
        role = "system" if self.role == "developer" else self.role
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return Message(role, text)


class ChatBody(Body):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)


@dataclass(frozen=True)
class Asked:
    """A request that was understood: one answer for each of ``requests``, ``n`` for each prompt in
    its order. ``chat`` says that their prompts are conversations."""

    requests: tuple[GenerationRequest, ...]
    n: int
    chat: bool
    stream: bool = False
    include_usage: bool = False
    echo: bool = False


def read_completion(value: Any, limits: Limits, *, seed: int) -> tuple[str, Asked]:
    """The model that the body of a completion names, and what it asks for; ``seed`` is taken where
    it names none. Raises ApiError for a body that is not valid."""
    body = _parsed(CompletionBody, value)
    if body.echo and body.logprobs is not None:
        raise ApiError(
            400,
            "echo: does not go with logprobs: prompts are not scored",
            param="echo",
            code="unsupported_parameter",
        )
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not prompts:
        raise ApiError(400, "prompt: has no texts", param="prompt", code="invalid_value")
    most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    names = {"max_new_tokens": "max_tokens"}
    return body.model, _asked(body, prompts, most, body.logprobs, limits, seed, names)


def read_chat(value: Any, limits: Limits, *, seed: int, max_seq_len: int) -> tuple[str, Asked]:
    """The same of a conversation. Without a number of tokens an answer may fill the context."""
    body = _parsed(ChatBody, value)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(
            400, "top_logprobs: goes with logprobs", param="top_logprobs", code="invalid_value"
        )
    messages = tuple(message.message() for message in body.messages)
    if messages[-1].role == "assistant":
        raise ApiError(
            400,
            "messages: the last one is the assistant's: an answer that was begun is not continued",
            param="messages",
            code="invalid_value",
        )
    given, name = body.max_completion_tokens, "max_completion_tokens"
    if given is None:
        given, name = body.max_tokens, "max_tokens"
    most = min(max_seq_len, limits.max_tokens) if given is None else given
    logprobs = body.top_logprobs if body.logprobs else None
    names = {"max_new_tokens": name, "prompt": "messages", "logprobs": "top_logprobs"}
    return body.model, _asked(body, [messages], most, logprobs, limits, seed, names)


BodyKind = TypeVar("BodyKind", bound=Body)


def _parsed(kind: type[BodyKind], value: Any) -> BodyKind:
    if not isinstance(value, dict):
        raise ApiError(400, "the body is no JSON object", code="invalid_json")
    given = _without_null(value)
    for name in [*given]:
        if name in IGNORED or (name in NEUTRAL and given[name] in NEUTRAL[name]):
            del given[name]
        elif name in NEUTRAL:
            message = f"{name}: is not offered"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _problem(error, kind) from None


def _without_null(value: Any) -> Any:
    """What is null is as if it were not there."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _problem(error: ValidationError, kind: type[Body]) -> ApiError:
    found: dict[str, str] = {}
    code = "invalid_value"
    for each in error.errors(include_url=False, include_input=False, include_context=False):
        # The names of a union's members are no part of the place.
        place = [part for part in each["loc"] if isinstance(part, int) or str(part).isidentifier()]
        place = [part for part in place if part not in ("str", "TextPart")]
        name = ".".join(map(str, place))[:200]
        if each["type"] == "extra_forbidden":
            code = "unknown_parameter" if not found else code
            near = did_you_mean(name, kind.model_fields) if len(place) == 1 else ""
            found.setdefault(name, f"is not known{f' ({near})' if near else ''}")
        elif each["type"] == "missing":
            code = "missing_parameter" if not found else code
            found.setdefault(name, "is missing")
        else:
            found.setdefault(name, each["msg"][:300])
    lines = [f"{name}: {message}" for name, message in found.items()][:10]
    return ApiError(400, "; ".join(lines), param=next(iter(found)), code=code)


def _asked(
    body: Body,
    prompts: Sequence[str | tuple[Message, ...]],
    most: int,
    logprobs: int | None,
    limits: Limits,
    seed: int,
    names: dict[str, str],
) -> Asked:
    if most > limits.max_tokens:
        name = names["max_new_tokens"]
        message = f"{name}: is {most}; this server gives at most {limits.max_tokens}"
        raise ApiError(400, message, param=name, code="invalid_value")
    if len(prompts) * body.n > limits.max_answers:
        raise ApiError(
            400,
            f"n: {len(prompts)} x {body.n} answers are more than the {limits.max_answers} that "
            "this server takes on",
            param="n",
            code="invalid_value",
        )
    if body.stream_options is not None and not body.stream:
        message = "stream_options: goes with stream"
        raise ApiError(400, message, param="stream_options", code="invalid_value")
    request = GenerationRequest(
        "",
        max_new_tokens=most,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        seed=seed if body.seed is None else body.seed,
        logprobs=logprobs,
    )
    try:
        checked = [check_request(replace(request, prompt=prompt)) for prompt in prompts]
        requests = [
            check_request(replace(each, seed=each.seed + number))
            for each in checked
            for number in range(body.n)
        ]
    except ConfigError as error:
        raise ApiError.of(error, names) from error
    return Asked(
        requests=tuple(requests),
        n=body.n,
        chat=isinstance(body, ChatBody),
        stream=body.stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        echo=isinstance(body, CompletionBody) and body.echo,
    )
