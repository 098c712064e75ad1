"""The routes of the server: OpenAI's protocol, the chat page, and whether it is well."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import resources
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apt_core import ConfigError, GenerationResult
from apt_core.cli.output import complain
from apt_core.error_text import one_line
from apt_core.json_files import parse_json
from apt_core.log import get_logger
from apt_core.runs import Session
from apt_plugins.serve.access import Access
from apt_plugins.serve.api_errors import ApiError
from apt_plugins.serve.bodies import Asked, read_chat, read_completion
from apt_plugins.serve.limits import Limits
from apt_plugins.serve.prompts import Prompts
from apt_plugins.serve.replies import Replies
from apt_plugins.serve.worker import Answer, Busy, Closing, Worker

log = get_logger("apt.serve")

SEND_SECONDS = 30.0
"""A client that takes nothing for so long has gone."""

DRAINED_BYTES = 16 << 20
"""Of a body that is too long, so much is read and dropped, so that its sender hears of it."""

RETRY_SECONDS = 1

PAGE = {"/": "chat.html", "/chat.css": "chat.css", "/chat.js": "chat.js"}
MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Timer(Protocol):
    """A call that is to come."""

    def cancel(self) -> object:
        """Let it not come."""


Later = Callable[[float, Callable[[], None]], Timer]
"""``later(seconds, call)`` calls ``call`` in the event loop when so much time has passed."""


def by_the_loop(seconds: float, call: Callable[[], None]) -> Timer:
    """A :data:`Later` by the clock of the running event loop."""
    return asyncio.get_running_loop().call_later(seconds, call)


REJECTED = {404: "there is nothing at this address", 405: "this address does not take this method"}


class Application:
    """What answers requests with the model of ``session``, by ``worker``. ``log_access`` prints a
    line for each; ``later`` tells when the time of one has passed."""

    def __init__(
        self,
        session: Session,
        worker: Worker,
        prompts: Prompts,
        limits: Limits,
        access: Access,
        *,
        model: str,
        log_access: bool = True,
        later: Later = by_the_loop,
    ) -> None:
        self._later = later
        self._session, self._worker, self._prompts = session, worker, prompts
        self._limits, self._access, self._model = limits, access, model
        self._log_access = log_access
        self._started = int(time.time())
        folder = resources.files("apt_plugins.serve")
        self._pages = {path: (folder / name).read_bytes() for path, name in PAGE.items()}
        routes = [Route(path, self._page, methods=["GET"]) for path in PAGE]
        routes += [
            Route("/health", self._health, methods=["GET"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{model:path}", self._model_row, methods=["GET"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        self._routes: ASGIApp = Starlette(
            routes=routes,
            exception_handlers={
                ApiError: _told,
                HTTPException: _rejected,
                _Gone: lambda request, error: _NoReply(),
                Exception: _failed,
            },
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began, status = time.monotonic(), 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        scope.setdefault("state", {})["note"] = ""
        try:
            await self._answered(scope, receive, tell)
        except Exception as error:
            # The routes have told it, or can tell nothing any more.
            log.debug("a request failed", exc_info=error)
            if not status:
                await _told(None, ApiError(500, "the server failed"))(scope, receive, tell)
        finally:
            if self._log_access and (scope["path"], status) != ("/health", 200):
                seconds = time.monotonic() - began
                note = scope["state"]["note"]
                client = (scope.get("client") or ("",))[0]
                complain(
                    f"{client} {scope['method']} {scope['path'][:200]} {status or 'gone'} "
                    f"{seconds:.2f} s{f', {note}' if note else ''}"
                )

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Request(scope).headers
        try:
            self._access.check_origin(headers)
            if scope["path"].startswith("/v1/"):
                self._access.check_key(headers)
        except ApiError as error:
            await _told(None, error)(scope, receive, send)
            return
        await self._routes(scope, receive, send)

    # What is asked for without a body -----------------------------------------------------------

    def _page(self, request: Request) -> Response:
        name = PAGE[request.url.path]
        kind = MEDIA_TYPES[name.rpartition(".")[2]]
        return Response(
            self._pages[request.url.path],
            media_type=kind,
            headers={"Content-Security-Policy": POLICY, "X-Frame-Options": "DENY"},
        )

    def _health(self, request: Request) -> Response:
        closing = self._worker.closing
        row = {
            "status": "closing" if closing else "ok",
            "model": self._model,
            "answers": self._worker.open_answers,
        }
        return JSONResponse(row, 503 if closing else 200)

    def _row(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._started,
            "owned_by": "apt",
            "step": self._session.position.step,
            "max_seq_len": self._session.config.model.max_seq_len,
            "max_tokens": self._limits.max_tokens,
            "chat_format": self._prompts.format.name,
            "notice": self._prompts.format.notice,
        }

    def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._row()]})

    def _model_row(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._row())

    def _check_model(self, name: str) -> None:
        if name not in ("", self._model):
            raise ApiError(
                404,
                f"there is no model {name[:200]!r} here, only {self._model!r}",
                param="model",
                code="model_not_found",
            )

    # Answers --------------------------------------------------------------------------------------

    async def _completions(self, request: Request) -> Response:
        value = await self._body(request)
        return self._answer(request, *read_completion(value, self._limits, seed=_any_seed()))

    async def _chat(self, request: Request) -> Response:
        value = await self._body(request)
        context = self._session.config.model.max_seq_len
        asked = read_chat(value, self._limits, seed=_any_seed(), max_seq_len=context)
        return self._answer(request, *asked)

    def _answer(self, request: Request, model: str, asked: Asked) -> Response:
        self._check_model(model)
        replies = Replies(asked, self._model, stripped=asked.chat and self._prompts.format.stripped)
        return _Reply(asked, replies, self._worker, self._prompts, self._limits, self._later)

    async def _body(self, request: Request) -> Any:
        """The JSON of the body. Raises ApiError for another type, one that is too long or too slow,
        and what is no JSON."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415, f"the Content-Type is {kind[:100]!r}, not application/json", code="media_type"
            )
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise ApiError(415, "compressed bodies are not taken", code="media_type")
        most, body, size = self._limits.max_body, bytearray(), 0
        announced = request.headers.get("content-length", "")
        try:
            async with asyncio.timeout(self._limits.read_timeout):
                too_long = announced.isdecimal() and int(announced[:20]) > DRAINED_BYTES
                while not too_long:
                    message = await request.receive()
                    if message["type"] != "http.request":
                        raise _Gone
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= most:
                        body += part
                    if size > DRAINED_BYTES or not message.get("more_body", False):
                        break
        except TimeoutError:
            closing = {"Connection": "close"}
            raise ApiError(
                408, "the body came too slowly", code="timeout", headers=closing
            ) from None
        if too_long or size > most:
            raise ApiError(
                413,
                f"the body is longer than the {most:,} bytes that this server takes",
                code="body_too_long",
                headers={"Connection": "close"},
            )
        try:
            return parse_json(body.decode("utf-8"))
        except ValueError as error:
            what = "UTF-8" if isinstance(error, UnicodeDecodeError) else f"JSON: {error}"
            raise ApiError(400, f"the body is no {what}"[:300], code="invalid_json") from None


class _Gone(Exception):
    """Nobody waits for the answer any more."""


class _NoReply(Response):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pass


class _Reply(Response):
    """Makes the answers while it is sent, and gives them up when its client goes away."""

    def __init__(
        self,
        asked: Asked,
        replies: Replies,
        worker: Worker,
        prompts: Prompts,
        limits: Limits,
        later: Later,
    ) -> None:
        self.background, self._later = None, later
        self._asked, self._replies, self._worker = asked, replies, worker
        self._limits = limits
        self._changed = asyncio.Event()
        self._expired = False
        loop = asyncio.get_running_loop()
        each = asked.n
        makers = [
            make
            for first in range(0, len(asked.requests), each)
            for make in prompts.of(asked.requests[first : first + each])
        ]
        self._answers = [
            Answer(make, loop, self._changed.set, streamed=asked.stream) for make in makers
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._worker.submit(self._answers)
        except Busy:
            raise ApiError(
                429,
                "the server is busy: as many requests wait as it takes on",
                code="queue_full",
                headers={"Retry-After": str(RETRY_SECONDS)},
            ) from None
        except Closing:
            raise ApiError(503, "the server is shutting down", code="closing") from None
        deadline = self._later(self._limits.request_timeout, self._expire)
        work = asyncio.create_task(self._send(scope, send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                with suppress(_Gone):
                    await work
            else:
                scope["state"]["note"] = "the client went away"
        finally:
            deadline.cancel()
            self._worker.give_up([answer for answer in self._answers if not answer.done])
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    def _expire(self) -> None:
        self._expired = True
        self._worker.give_up([answer for answer in self._answers if not answer.done])

    async def _send(self, scope: Scope, send: Send) -> None:
        async def take(message: Message) -> None:
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await send(message)
            except TimeoutError:
                scope["state"].get("abort", lambda: None)()
                scope["state"]["note"] = "the client took nothing"
                raise _Gone from None

        if self._asked.stream:
            await self._stream(take)
        else:
            while not all(answer.done for answer in self._answers):
                await self._change()
            results = self._results()
            reply = self._replies.whole(results, [answer.tokens for answer in self._answers])
            await JSONResponse(reply)(scope, _nothing, take)
        results = [answer.result for answer in self._answers if answer.result is not None]
        usage = self._replies.usage(results)
        scope["state"]["note"] = f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens"

    async def _change(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def _results(self) -> list[GenerationResult]:
        """The results of all answers. Raises ApiError for one that has none."""
        return [self._result(answer) for answer in self._answers]

    def _result(self, answer: Answer) -> GenerationResult:
        if isinstance(answer.error, ConfigError):
            raise ApiError.of(answer.error, {"prompt": "messages"} if self._asked.chat else {})
        if answer.error is not None or answer.result is None:
            raise ApiError(500, "the model failed at this request", code="engine_failed")
        result = answer.result
        if result.finish_reason == "not_finite":
            raise ApiError(500, "the model's logits are not finite", code="not_finite")
        if result.finish_reason == "interrupted":
            if not self._expired:
                raise ApiError(503, "the server is shutting down", code="closing")
            if not result.token_ids:
                raise ApiError(503, "the time for this request has passed", code="timeout")
            return replace(result, finish_reason="length")
        return result

    async def _stream(self, send: Callable[[Message], Awaitable[None]]) -> None:
        # The status is told when it is known: by the first piece.
        while not any(answer.pieces or answer.done for answer in self._answers):
            await self._change()
        for answer in self._answers:
            if answer.done:
                self._result(answer)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def tell(rows: Sequence[Mapping[str, Any] | None]) -> None:
            body = b"".join(_event(row) for row in rows if row is not None)
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})

        await tell([self._replies.begin(number) for number in range(len(self._answers))])
        open_ = dict(enumerate(self._answers))
        results: dict[int, GenerationResult] = {}
        try:
            while open_:
                self._changed.clear()
                rows: list[Mapping[str, Any] | None] = []
                for number, answer in [*open_.items()]:
                    done, piece = answer.done, answer.take()
                    if piece is not None:
                        rows.append(self._replies.piece(number, piece))
                    if done:
                        results[number] = self._result(answer)
                        rows.append(self._replies.end(number, results[number]))
                        del open_[number]
                await tell(rows)
                if open_:
                    await self._changed.wait()
            ends: list[Mapping[str, Any] | None] = []
            if self._asked.include_usage:
                ends.append(self._replies.last([results[n] for n in sorted(results)]))
            await tell(ends)
            end = b"data: [DONE]\n\n"
        except ApiError as error:
            end = _event(error.body)
        await send({"type": "http.response.body", "body": end, "more_body": False})


def _event(row: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _any_seed() -> int:
    return secrets.randbits(31)


def _told(request: Request | None, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, headers=error.headers)


def _rejected(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = REJECTED.get(error.status_code, error.detail)
    found = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    return _told(request, found)


def _failed(request: Request, error: Exception) -> JSONResponse:
    log.error("a request failed: %s", one_line(error))
    return _told(request, ApiError(500, "the server failed at this request"))
