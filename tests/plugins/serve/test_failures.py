"""A model that fails at one request goes on with the others, and an engine that ends is told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from apt_core import GenerationRequest, GenerationResult
from apt_core.errors import AptError
from apt_core.inference import Engine, generate
from apt_core.runs import Session
from apt_plugins.serve import serving
from apt_plugins.serve.worker import Answer, Worker
from tests.inference.conftest import lively_session
from tests.plugins.serve.conftest import SECONDS, Running, running_server

POISON = "poison"


class Fragile(Engine):
    """Fails in the fifth token of a text that begins with poison, and all that is beside it."""

    def step(self) -> bool:
        more = super().step()
        for row in [*self._active]:
            if str(row.request.prompt).startswith(POISON) and len(row.text.ids) > 11:
                for each in [*self._active]:
                    each.ticket.error = MemoryError("broken on purpose")
                    self._leave(each)
                raise MemoryError("broken on purpose")
        return more


async def answers_of(
    worker: Worker, requests: list[GenerationRequest], *, streamed: bool
) -> list[tuple[str, int, Answer]]:
    """For each request the text and the number of tokens that were told, and its answer."""
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()
    answers = [
        Answer(lambda request=request: request, loop, changed.set, streamed=streamed)  # type: ignore[misc]
        for request in requests
    ]
    worker.submit(answers)
    texts, tokens = [""] * len(answers), [0] * len(answers)
    async with asyncio.timeout(SECONDS):
        while not all(answer.done for answer in answers):
            await changed.wait()
            changed.clear()
            for number, answer in enumerate(answers):
                piece = answer.take()
                texts[number] += "" if piece is None else piece.text
                tokens[number] += 0 if piece is None else len(piece.tokens)
    return [*zip(texts, tokens, answers, strict=True)]


@pytest.mark.parametrize("streamed", [True, False])
def test_what_fails_with_another_is_made_again_alone(streamed: bool) -> None:
    session = lively_session()
    requests = [
        GenerationRequest(prompt, max_new_tokens=16, seed=seed, logprobs=1)
        for seed, prompt in enumerate(["The é", POISON, "a", POISON, "b"])
    ]
    worker = Worker(lambda: Fragile(session, max_batch=4), max_answers=8)
    worker.start()
    try:
        found = asyncio.run(answers_of(worker, requests, streamed=streamed))
        again = asyncio.run(answers_of(worker, requests[:1], streamed=streamed))
        assert worker.open_answers == 0
    finally:
        worker.stop(SECONDS)
    assert worker.failure is None
    other = lively_session()
    for request, (text, tokens, answer) in zip(
        [*requests, requests[0]], [*found, *again], strict=True
    ):
        expected = generate(other, request)
        if request.prompt == POISON:
            assert isinstance(answer.error, MemoryError) and answer.result is None
            assert expected.text.startswith(text) and len(text) < len(expected.text)
        else:
            assert isinstance(answer.result, GenerationResult) and answer.error is None
            assert answer.result.text == expected.text
            assert (text, tokens) == ((expected.text, 16) if streamed else ("", 0))


def test_the_client_hears_of_it_and_the_server_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "Engine", Fragile)
    poison = {"prompt": POISON, "max_tokens": 16}
    with running_server(lively_session()) as server:
        status, found, _ = server.ask("/v1/completions", poison)
        assert (status, found["error"]["code"]) == (500, "engine_failed")
        assert "purpose" not in found["error"]["message"]
        status, events, _ = server.ask("/v1/completions", {**poison, "stream": True})
        assert status == 200 and b'"engine_failed"' in events and b"[DONE]" not in events
        assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200


def test_logits_that_are_not_finite_are_an_error() -> None:
    import torch

    session = lively_session()
    with torch.no_grad():
        next(iter(session.model.parameters())).fill_(float("nan"))
    with running_server(session) as server:
        for stream in (False, True):
            body = {"prompt": "a", "stream": stream}
            status, found, _ = server.ask("/v1/completions", body)
            assert (status, found["error"]["code"]) == (500, "not_finite")


def test_the_end_of_the_engines_thread_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[BaseException] = []

    class Dies(Engine):
        def step(self) -> bool:
            raise SystemExit("broken on purpose")

    def serve(session: Session, *arguments: Any, **options: Any) -> int:
        try:
            return serving.serve_session(session, *arguments, **options)
        except AptError as error:
            ended.append(error)
            return error.exit_code

    monkeypatch.setattr(serving, "Engine", Dies)
    monkeypatch.setattr("tests.plugins.serve.conftest.serve_session", serve)
    with running_server(lively_session()) as server:
        running: Running = server
        status, found, _ = running.ask("/v1/completions", {"prompt": "a"})
        assert status == 500 and "error" in found
        running.thread.join(SECONDS)
        assert running.exit_codes == [1]
    assert "broken on purpose" in str(ended[0])
