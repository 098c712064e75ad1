"""From answers to the JSON of OpenAI's protocol."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from apt_core import GenerationResult
from apt_core.inference.stopping import UNDECODED
from apt_core.json_files import without_nan
from apt_plugins.serve.bodies import Asked
from apt_plugins.serve.prompts import Stripped
from apt_plugins.serve.worker import Piece, Token


class Replies:
    """The replies to one request, whole or as chunks of a stream. ``stripped`` answers have no
    white space around them."""

    def __init__(self, asked: Asked, model: str, *, stripped: bool) -> None:
        self._asked, self._stripped = asked, stripped
        kind = "chatcmpl" if asked.chat else "cmpl"
        self._head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time())}
        self._model = model
        self._strippers = [Stripped() for _ in asked.requests]
        self._offsets = [len(self._echo(number)) for number in range(len(asked.requests))]

    def whole(
        self, results: Sequence[GenerationResult], tokens: Sequence[Sequence[Token]]
    ) -> dict[str, Any]:
        """The reply that has all answers."""
        choices = []
        for number, (result, known) in enumerate(zip(results, tokens, strict=True)):
            text = self._echo(number) + (result.text.strip() if self._stripped else result.text)
            content: dict[str, Any] = (
                {"message": {"role": "assistant", "content": text}}
                if self._asked.chat
                else {"text": text}
            )
            choices.append(self._choice(number, content, known) | self._ending(result))
        kind = "chat.completion" if self._asked.chat else "text_completion"
        return {**self._of(kind, choices), "usage": self.usage(results)}

    def begin(self, number: int) -> dict[str, Any] | None:
        """The first chunk of an answer, if there is something to say before its text."""
        if self._asked.chat:
            return self._chunk(number, {"role": "assistant", "content": ""})
        echo = self._echo(number)
        return self._chunk(number, {"text": echo}) if echo else None

    def piece(self, number: int, piece: Piece) -> dict[str, Any] | None:
        """The chunk of a piece."""
        text = self._strippers[number].add(piece.text) if self._stripped else piece.text
        if not text and not piece.tokens:
            return None
        return self._chunk(number, {"content" if self._asked.chat else "text": text}, piece.tokens)

    def end(self, number: int, result: GenerationResult) -> dict[str, Any]:
        """The last chunk of an answer."""
        chunk = self._chunk(number, {} if self._asked.chat else {"text": ""})
        chunk["choices"][0] |= self._ending(result)
        return chunk

    def last(self, results: Sequence[GenerationResult]) -> dict[str, Any]:
        """The chunk after all answers, which has the usage."""
        return {**self._of(self._chunk_kind, []), "usage": self.usage(results)}

    def usage(self, results: Sequence[GenerationResult]) -> dict[str, int]:
        """The tokens that the model saw of each prompt, and those that it made."""
        prompts = results[:: self._asked.n]
        seen = sum(result.prompt_tokens - result.dropped_tokens for result in prompts)
        made = sum(len(result.token_ids) for result in results)
        return {"prompt_tokens": seen, "completion_tokens": made, "total_tokens": seen + made}

    def _of(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "model": self._model, "choices": choices}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._asked.chat else "text_completion"

    def _chunk(
        self, number: int, content: dict[str, Any], tokens: Sequence[Token] = ()
    ) -> dict[str, Any]:
        content = {"delta": content} if self._asked.chat else content
        return self._of(self._chunk_kind, [self._choice(number, content, tokens)])

    def _choice(
        self, number: int, content: dict[str, Any], tokens: Sequence[Token]
    ) -> dict[str, Any]:
        wanted = self._asked.requests[number].logprobs is not None
        logprobs = None
        if wanted and tokens:
            logprobs = (
                _chat_logprobs(tokens) if self._asked.chat else self._logprobs(number, tokens)
            )
        return {"index": number, **content, "logprobs": logprobs, "finish_reason": None}

    def _ending(self, result: GenerationResult) -> dict[str, Any]:
        reason = "stop" if result.finish_reason == "stop" else "length"
        ending: dict[str, Any] = {"finish_reason": reason}
        if result.dropped_tokens:
            ending["dropped_tokens"] = result.dropped_tokens
        if result.sources:
            ending["sources"] = [without_nan(asdict(source)) for source in result.sources]
        return ending

    def _echo(self, number: int) -> str:
        prompt = self._asked.requests[number].prompt
        return prompt if self._asked.echo and isinstance(prompt, str) else ""

    def _logprobs(self, number: int, tokens: Sequence[Token]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[number])
            self._offsets[number] += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [max(token.logprob, LEAST_LOGPROB) for token in tokens],
            "top_logprobs": [
                {text: max(value, LEAST_LOGPROB) for text, value in token.top} for token in tokens
            ],
            "text_offset": offsets,
        }


def _chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    def row(text: str, logprob: float) -> dict[str, Any]:
        # Of a token that is a part of a character the text is not its bytes.
        known = None if UNDECODED in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": known}

    return {
        "content": [
            {
                **row(token.text, token.logprob),
                "top_logprobs": [row(*each) for each in token.top],
            }
            for token in tokens
        ]
    }


LEAST_LOGPROB = -9999.0
"""Stands for what has no probability: JSON has no infinity."""
