"""OpenAI's own client gets what ``generate`` gives, whole and in pieces, alone and among others."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from tests.optional import optional

openai = optional("openai", "the protocol's own client is not installed")

from apt_core import GenerationRequest, Message
from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.inference import generate
from apt_core.providers.tokenizer import TokenizerProvider
from apt_core.runs import Session
from apt_core.testing import tiny_session
from apt_plugins.serve.limits import Limits
from tests.inference.conftest import lively_session
from tests.plugins.serve.conftest import Running, running_server


def client_of(server: Running, **options: Any) -> Any:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", **{"api_key": "none", "max_retries": 0, **options}
    )


@pytest.fixture(scope="module")
def plain() -> Iterator[tuple[Running, Any]]:
    """A server without a plugin, whose texts get as long as they may."""
    with running_server(endless_session()) as server:
        yield server, client_of(server)


@pytest.fixture(scope="module")
def session() -> Session:
    """One with the same weights."""
    return endless_session()


class Endless(ByteTokenizer):
    """Has tokens for turns, and none for an end."""

    special = replace(ByteTokenizer().special, eos=None, end=None)


def endless_session() -> Session:
    return replace(lively_session(), tokenizer=Endless())


SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.2, "extra_body": {"top_k": 9, "min_p": 0.01, "repetition_penalty": 1.2}},
    {"stop": ["zz", "e"]},
)


def expected(session: Session, prompt: Any, settings: dict[str, Any], **more: Any) -> Any:
    own = {**settings, **settings.get("extra_body", {}), **more}
    own.pop("extra_body", None)
    return generate(session, GenerationRequest(prompt, **own))


def test_eight_at_once_get_what_each_gets_alone(
    plain: tuple[Running, Any], session: Session
) -> None:
    _, client = plain
    asked = [
        (chat, stream, settings, 7 * number)
        for number, settings in enumerate(SETTINGS)
        for chat in (False, True)
        for stream in (False, True)
    ]

    def ask(case: tuple[bool, bool, dict[str, Any], int]) -> tuple[str, str, Any]:
        chat, stream, settings, seed = case
        more = {"include_usage": True}
        options = {**settings, "model": "tiny", "seed": seed, "max_tokens": 20, "stream": stream}
        options |= {"stream_options": more} if stream else {}
        found: Any
        if chat:
            messages = [{"role": "system", "content": "é"}, {"role": "user", "content": "The "}]
            found = client.chat.completions.create(messages=messages, **options)
        else:
            found = client.completions.create(prompt="The é", **options)
        if not stream:
            choice = found.choices[0]
            return (
                choice.message.content if chat else choice.text,
                choice.finish_reason,
                found.usage,
            )
        chunks = [*found]
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        pieces = [choice.delta.content if chat else choice.text for choice in choices]
        return "".join(filter(None, pieces)), choices[-1].finish_reason, chunks[-1].usage

    with ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(ask, asked)]
    for (chat, _, settings, seed), (text, reason, usage) in zip(asked, answers, strict=True):
        prompt: Any = [Message("system", "é"), Message("user", "The ")] if chat else "The é"
        result = expected(session, prompt, settings, seed=seed, max_new_tokens=20)
        assert (text, reason) == (result.text, result.finish_reason), (chat, settings)
        assert usage.completion_tokens == len(result.token_ids)
        assert usage.prompt_tokens == result.prompt_tokens - result.dropped_tokens
    assert len({text for text, *_ in answers}) > 4


def test_several_prompts_and_several_answers_of_each(
    plain: tuple[Running, Any], session: Session
) -> None:
    _, client = plain
    options: Any = {"model": "tiny", "n": 2, "seed": 5, "max_tokens": 9, "logprobs": 2}
    whole = client.completions.create(prompt=["a", "The é"], **options)
    results = [
        expected(session, prompt, {}, seed=seed, max_new_tokens=9, logprobs=2)
        for prompt in ("a", "The é")
        for seed in (5, 6)
    ]
    assert [choice.text for choice in whole.choices] == [result.text for result in results]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 36
    assert whole.usage.prompt_tokens == results[0].prompt_tokens + results[2].prompt_tokens
    for choice, result in zip(whole.choices, results, strict=True):
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx(
            [token.logprob for token in result.logprobs], abs=1e-4
        )
    texts, logprobs = [""] * 4, [0] * 4
    for chunk in client.completions.create(prompt=["a", "The é"], stream=True, **options):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        if choice.logprobs is not None:
            logprobs[choice.index] += len(choice.logprobs.tokens or ())
    assert (texts, logprobs) == ([result.text for result in results], [9] * 4)
    echoed = client.completions.create(model="tiny", prompt="é <", echo=True, seed=1, max_tokens=3)
    assert echoed.choices[0].text.startswith("é <")


def test_a_conversation_has_logprobs_that_add_up(plain: tuple[Running, Any]) -> None:
    _, client = plain
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "Hé"}]}]
    options: Any = {"model": "tiny", "messages": messages, "seed": 2, "max_completion_tokens": 12}
    options |= {"logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**options).choices[0].logprobs
    assert whole is not None and whole.content is not None and len(whole.content) == 12
    for token in whole.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= token.top_logprobs[0].logprob + 1e-5
    pieces = [
        token
        for chunk in client.chat.completions.create(**options, stream=True)
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or ()
    ]
    assert [(token.token, token.bytes) for token in pieces] == [
        (token.token, token.bytes) for token in whole.content
    ]


def test_models_are_listed(plain: tuple[Running, Any]) -> None:
    _, client = plain
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        client.models.retrieve("other")


def test_pieces_split_no_character_and_leak_no_stop_string(server: Running) -> None:
    """The model says a byte at a time: a character has several, and so has the stop string."""
    client = client_of(server)
    text = "Zoë 字 🙂 ST STO end STOP never"
    options: Any = {"model": "tiny", "prompt": f"say {text}", "max_tokens": 200, "stop": "STOP"}
    chunks = [*client.completions.create(stream=True, **options)]
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert (
        "".join(pieces) == "Zoë 字 🙂 ST STO end " and chunks[-1].choices[0].finish_reason == "stop"
    )
    assert not any("\ufffd" in piece for piece in pieces)
    assert client.completions.create(**options).choices[0].text == "Zoë 字 🙂 ST STO end "
    options["stop"] = ["never comes"]
    assert client.completions.create(**options).choices[0].text == text


def test_the_beginning_of_what_is_too_long_is_left_out_and_told(server: Running) -> None:
    """The context has 64 tokens."""
    status, found, _ = server.ask("/v1/completions", {"prompt": "a" * 300, "max_tokens": 2})
    assert status == 200 and found["choices"][0]["dropped_tokens"] > 230
    assert found["usage"]["prompt_tokens"] <= 64
    turns = [{"role": "user", "content": f"turn {n}"} for n in range(400)]
    body = {"messages": [*turns, {"role": "user", "content": "say hi"}], "max_tokens": 4}
    status, found, _ = server.ask("/v1/chat/completions", body)
    assert (status, found["choices"][0]["message"]["content"]) == (200, "hi")
    assert found["usage"]["prompt_tokens"] <= 64 and "dropped_tokens" not in found["choices"][0]


def test_an_empty_prompt_and_an_empty_answer(server: Running) -> None:
    status, found, _ = server.ask("/v1/completions", {"prompt": "", "max_tokens": 2})
    assert status == 200 and found["usage"]["prompt_tokens"] == 1
    for stream in (False, True):
        body = {"messages": [{"role": "user", "content": "say "}], "stream": stream}
        status, found, _ = server.ask("/v1/chat/completions", body)
        assert status == 200
        if stream:
            rows = [json.loads(line[6:]) for line in found.split(b"\n\n") if line[6:7] == b"{"]
            assert rows[-1]["choices"][0]["finish_reason"] == "stop"
            assert "".join(row["choices"][0]["delta"].get("content", "") for row in rows) == ""
        else:
            assert found["choices"][0]["message"]["content"] == ""


def test_a_plugin_that_fails_leaves_plain_generation(server: Running) -> None:
    body = {"prompt": "break", "max_tokens": 8, "temperature": 0}
    status, found, _ = server.ask("/v1/completions", body)
    result = generate(
        lively_session(endless=False), GenerationRequest("break", max_new_tokens=8, temperature=0)
    )
    assert (status, found["choices"][0]["text"]) == (200, result.text)


class Untemplated(TokenizerProvider):
    """Encodes no conversation."""

    name = "untemplated"
    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Any) -> str:
        return bytes(ids).decode(errors="replace")


def test_without_a_template_a_conversation_is_lines_of_who_speaks() -> None:
    session = replace(tiny_session(overrides={"model.max_seq_len": 64}), tokenizer=Untemplated())
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "seed": 4}
    with running_server(session) as server:
        (model,) = server.ask("/v1/models")[1]["data"]
        assert model["chat_format"] == "dialogue" and "no chat template" in model["notice"]
        whole = server.ask("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]
        events = server.ask("/v1/chat/completions", {**body, "stream": True})[1]
    rows = [json.loads(line[6:]) for line in events.split(b"\n\n") if line[6:7] == b"{"]
    streamed = "".join(row["choices"][0]["delta"].get("content", "") for row in rows)
    request = GenerationRequest(
        "User: Hi\nAssistant:", max_new_tokens=12, seed=4, stop=("\nUser:", "\nSystem:")
    )
    assert whole == streamed == generate(session, request).text.strip()


def stream_of(
    server: Running, prompt: str, turns: int = 1
) -> tuple[socket.socket, http.client.HTTPResponse]:
    """A connection whose answer has begun."""
    connection = http.client.HTTPConnection(*server.place, timeout=60)
    body = json.dumps({"prompt": prompt, "stream": True, "max_tokens": 500})
    before = server.open_answers()
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    taken = connection.sock
    server.until(lambda: server.open_answers() > before)
    server.turns.release(turns)
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    return taken, response


def test_clients_that_hang_up_free_their_places_and_a_flood_is_refused() -> None:
    limits = Limits(max_batch=2, max_queue=2)
    body = {"prompt": "wait", "max_tokens": 1}
    with running_server(limits=limits) as server, ThreadPoolExecutor(8) as pool:
        first, _ = stream_of(server, "wait")
        waiting = [pool.submit(server.ask, "/v1/completions", body) for _ in range(3)]
        server.until(lambda: server.open_answers() == 4)
        for _ in range(5):
            status, found, headers = server.ask("/v1/completions", body)
            assert (status, found["error"]["code"]) == (429, "queue_full")
            assert headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            client_of(server).completions.create(model="tiny", prompt="wait")
        first.shutdown(socket.SHUT_RDWR)
        server.drain()
        assert {future.result(60)[0] for future in waiting} == {200}
        while server.turns.acquire(blocking=False):
            pass
        # One that waits for its place leaves the queue, too.
        first, _ = stream_of(server, "wait")
        second, _ = stream_of(server, "wait", turns=3)
        third = http.client.HTTPConnection(*server.place)
        third.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        server.until(lambda: server.open_answers() == 3)
        third.close()
        first.shutdown(socket.SHUT_RDWR)
        second.shutdown(socket.SHUT_RDWR)
        server.drain()
        assert server.ask("/v1/completions", {"prompt": "say on"})[1]["choices"][0]["text"] == "on"


class Clock:
    """Time passes when it is told to."""

    def __init__(self) -> None:
        self.due: list[tuple[float, Callable[[], None]]] = []

    def later(self, seconds: float, call: Callable[[], None]) -> Clock:
        loop = asyncio.get_running_loop()
        self.due.append((seconds, lambda: loop.call_soon_threadsafe(call)))
        return self

    def cancel(self) -> None: ...

    def pass_(self) -> list[float]:
        """Let the time of all pass; how much that was."""
        for _, call in self.due:
            call()
        return [seconds for seconds, _ in self.due]


def test_an_answer_ends_when_its_time_has_passed() -> None:
    clock = Clock()
    limits = Limits(request_timeout=99.0, max_batch=1)
    with running_server(limits=limits, later=clock.later) as server:
        _, response = stream_of(server, "wait")
        server.turns.release(1)
        # Its engine waits: the one behind it has no token when its time has passed.
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(server.ask, "/v1/completions", {"prompt": "a", "stream": True})
            server.until(lambda: server.open_answers() == 2)
            assert clock.pass_() == [99.0, 99.0]
            server.open_answers()  # the loop has been round
            server.turns.release(2)
            assert b'"finish_reason":"length"' in response.read()
            status, found, _ = late.result(60)
        assert (status, found["error"]["code"]) == (503, "timeout")


def test_a_shutdown_ends_streams_after_their_time_and_says_so() -> None:
    limits = Limits(shutdown_timeout=0.3)
    with running_server(limits=limits) as server:
        _, response = stream_of(server, "wait")
        server.interrupts.received = signal.SIGTERM
        with ThreadPoolExecutor(1) as pool:
            rest = pool.submit(response.read)
            while not rest.done():
                server.turns.release()
                time.sleep(0.05)
        events = rest.result()
        assert b'"code":"closing"' in events and b"[DONE]" not in events
        assert server.stop() == 143


def test_a_shutdown_lets_answers_end() -> None:
    with running_server() as server:
        body = {"prompt": "wait", "max_tokens": 3}
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.ask, "/v1/completions", body)
            server.until(lambda: server.open_answers() == 1)
            server.interrupts.received = signal.SIGINT
            server.turns.release(3)
            assert asked.result(60)[1]["choices"][0]["text"] == "www"
        server.thread.join(60)
        assert server.exit_codes == [130]
        with pytest.raises(OSError):
            socket.create_connection(server.place)
