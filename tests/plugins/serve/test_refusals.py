"""What is no proper request is refused in the protocol's form, and nothing else is harmed."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from apt_plugins.serve.limits import Limits
from tests.plugins.serve.conftest import Running, running_server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]
SURROGATE = b'{"prompt": "\\ud800"}'

REFUSED: tuple[tuple[str, Any, str | None, str], ...] = (
    (COMPLETIONS, b"[1", None, "is no JSON"),
    (COMPLETIONS, b"[" * 100_000, None, "nested too deep"),
    (COMPLETIONS, b'{"prompt": "\xff"}', None, "no UTF-8"),
    (COMPLETIONS, b"", None, "is no JSON"),
    (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', "temperature", "is nan"),
    (COMPLETIONS, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", None, "is no JSON"),
    (COMPLETIONS, SURROGATE, "prompt", "lone surrogate"),
    (COMPLETIONS, [], None, "no JSON object"),
    (COMPLETIONS, {}, "prompt", "is missing"),
    (COMPLETIONS, {"prompt": 3}, "prompt", "valid string"),
    (COMPLETIONS, {"prompt": [1, 2]}, "prompt", "valid string"),
    (COMPLETIONS, {"prompt": []}, "prompt", "no texts"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature", "is -1"),
    (COMPLETIONS, {"prompt": "a", "temperature": True}, "temperature", "valid number"),
    (COMPLETIONS, {"prompt": "a", "top_p": 0, "min_p": 2}, "top_p", "; min_p: is 2"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens", "is 0"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 10**9}, "max_tokens", "at most 4096"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": "9"}, "max_tokens", "valid integer"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
    (COMPLETIONS, {"prompt": ["a"] * 50, "n": 2}, "n", "50 x 2"),
    (COMPLETIONS, {"prompt": "a", "stop": ["", "x"]}, "stop", "with characters"),
    (COMPLETIONS, {"prompt": "a", "seed": 1 << 70}, "seed", "is 1180591620717411303424"),
    (COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 1}, "echo", "logprobs"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs", "less than or equal to 20"),
    (COMPLETIONS, {"prompt": "a", "temprature": 1}, "temprature", "'temperature'"),
    (COMPLETIONS, {"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "not offered"),
    (COMPLETIONS, {"prompt": "a", "best_of": 3}, "best_of", "not offered"),
    (COMPLETIONS, {"prompt": "a", "stream_options": {}}, "stream_options", "goes with stream"),
    (CHAT, {"messages": []}, "messages", "at least 1 item"),
    (CHAT, {"messages": [{"role": "usr", "content": "a"}]}, "messages.0.role", "'assistant'"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
    (CHAT, {"messages": [*USER, {"role": "assistant", "content": "a"}]}, "messages", "begun"),
    (CHAT, {"messages": [{**USER[0], "name": "me"}]}, "messages.0.name", "not known"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content",
        "'text'",
    ),
    (CHAT, {"messages": USER, "top_logprobs": 2}, "top_logprobs", "goes with logprobs"),
    (CHAT, {"messages": USER, "tools": [{"type": "function"}]}, "tools", "not offered"),
    (CHAT, {"messages": USER, "response_format": {"type": "json_object"}}, "response_format", ""),
    (CHAT, {"messages": USER, "max_completion_tokens": -1}, "max_completion_tokens", "is -1"),
)


def test_each_mistake_is_named(server: Running) -> None:
    for path, body, param, says in REFUSED:
        status, found, _ = server.ask(path, body)
        error = found["error"]
        assert (status, error["type"]) == (400, "invalid_request_error"), (body, error)
        assert says in error["message"] and len(error["message"]) < 2100, (body, error)
        if param is not None:
            assert error["param"] == param, (body, error)
        assert error["code"]
    assert server.open_answers() == 0


def test_parameters_that_ask_for_nothing_are_taken(server: Running) -> None:
    neutral = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "somebody",
        "metadata": {"a": "b"}, "seed": None, "stop": None, "store": False, "service_tier": "auto",
        "max_tokens": 2,
    }  # fmt: skip
    assert server.ask(COMPLETIONS, {"prompt": "a", "suffix": "", **neutral})[0] == 200
    chat = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    messages = [{"role": "developer", "content": "x"}, {**USER[0], "name": None}]
    assert server.ask(CHAT, {"messages": messages, **neutral, **chat})[0] == 200


def test_addresses_methods_types_and_models(server: Running) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    data = json.dumps(body).encode()
    cases: tuple[tuple[int, str | None, tuple[str, Any], dict[str, Any]], ...] = (
        (404, None, ("/v1/embeddings", body), {}),
        (404, None, ("/v1/../etc/passwd", None), {}),
        (404, None, ("/chat.py", None), {}),
        (405, None, (COMPLETIONS, None), {}),
        (404, "model_not_found", (COMPLETIONS, {**body, "model": "gpt-4"}), {}),
        (415, "media_type", (COMPLETIONS, data), {"headers": {"Content-Type": "text/plain"}}),
        (415, "media_type", (COMPLETIONS, data), {"headers": {"Content-Encoding": "gzip"}}),
    )
    for status, code, arguments, options in cases:
        found = server.ask(*arguments, **options)
        assert (found[0], found[1]["error"]["code"]) == (status, code), arguments
    status, _, headers = server.ask("/", method="HEAD")
    assert status == 200 and headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


def test_other_names_and_other_pages_are_refused(server: Running) -> None:
    """A page whose name resolves to this machine has its own Host, others have an Origin."""
    body = {"prompt": "a", "max_tokens": 1}
    port = server.place[1]
    own, other = f"127.0.0.1:{port}", "evil.example"
    cases = (
        ({"Host": other}, 403),
        ({"Host": f"{other}:{port}"}, 403),
        ({"Host": ""}, 403),
        ({"Host": f"LOCALHOST:{port}"}, 200),
        ({"Host": f"[::1]:{port}"}, 200),
        ({"Host": own, "Origin": f"http://{own}"}, 200),
        ({"Host": own, "Origin": f"http://{other}"}, 403),
        ({"Host": own, "Origin": "null"}, 403),
        ({"Host": own, "Origin": f"http://127.0.0.1:{port + 1}"}, 403),
    )
    for headers, status in cases:
        for path, sent in ((COMPLETIONS, body), ("/", None), ("/health", None)):
            assert server.ask(path, sent, headers=headers)[0] == status, (headers, path)
    with running_server(names=("models.example",)) as named:
        assert named.ask("/", headers={"Host": "models.example"})[0] == 200
        assert named.ask("/", headers={"Host": other})[0] == 403


def test_without_the_key_nothing_is_answered(capfd: pytest.CaptureFixture[str]) -> None:
    body = {"prompt": "say yes"}
    with running_server(key="sesame-1234") as server:
        for given in (None, "Bearer wrong", "Bearer", "Basic sesame-1234", "Bearer séame"):
            headers = {} if given is None else {"Authorization": given.encode("latin-1")}
            status, found, told = server.ask(COMPLETIONS, body, headers=headers)  # type: ignore[arg-type]
            assert (status, found["error"]["code"]) == (401, "invalid_api_key"), given
            assert told["www-authenticate"] == "Bearer"
        assert server.ask("/v1/models")[0] == 401
        assert server.ask("/")[0] == server.ask("/health")[0] == 200
        headers = {"Authorization": "bearer sesame-1234"}
        assert server.ask(COMPLETIONS, body, headers=headers)[1]["choices"][0]["text"] == "yes"
    assert "sesame" not in "".join(capfd.readouterr())


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    limits = Limits(max_body=2000, read_timeout=0.5, max_connections=8)
    with running_server(limits=limits) as found:
        yield found


def raw(server: Running, *parts: bytes) -> socket.socket:
    """A connection on which the parts of a request were sent."""
    connection = socket.create_connection(server.place, timeout=60)
    for part in parts:
        connection.sendall(part)
    return connection


def head(server: Running, *lines: str) -> bytes:
    own = f"POST {COMPLETIONS} HTTP/1.1", f"Host: {server.url[7:]}"
    return "\r\n".join([*own, "Content-Type: application/json", *lines, "", ""]).encode()


def everything(connection: socket.socket) -> bytes:
    found = b""
    with connection:
        while part := connection.recv(1 << 16):
            found += part
    return found


def test_bodies_that_are_too_long_are_refused(strict: Running) -> None:
    long = json.dumps({"prompt": "a" * 3000}).encode()
    status, found, _ = strict.ask(COMPLETIONS, long)
    assert (status, found["error"]["code"]) == (413, "body_too_long")
    assert strict.ask(COMPLETIONS, b" " * 2_000_000)[0] == 413
    announced = everything(raw(strict, head(strict, "Content-Length: 99999999999999")))
    assert announced.startswith(b"HTTP/1.1 413 ")
    chunk = b"3e8\r\n" + b" " * 1000 + b"\r\n"
    chunked = head(strict, "Transfer-Encoding: chunked"), chunk * 3, b"0\r\n\r\n"
    assert everything(raw(strict, *chunked)).startswith(b"HTTP/1.1 413 ")


def test_what_does_not_arrive_is_not_waited_for(strict: Running) -> None:
    slow = raw(strict, head(strict, "Content-Length: 100"), b'{"prom')
    assert everything(slow).startswith(b"HTTP/1.1 408 ")
    for part in (b"", b"POST /v1/comp", head(strict)[:-2]):
        assert everything(raw(strict, part)) == b""
    again = raw(strict, head(strict, "Content-Length: 2"), b"{}")
    assert again.recv(1 << 16).startswith(b"HTTP/1.1 400 ")
    again.sendall(b"GET / HT")
    everything(again)
    garbage = raw(strict, b"\x16\x03\x01\x02\x00\x01\r\n\r\n")
    assert everything(garbage).startswith(b"HTTP/1.1 400 ")
    gone = raw(strict, head(strict, "Content-Length: 100"), b"{")
    gone.close()
    assert strict.ask(COMPLETIONS, {"prompt": "say on"})[1]["choices"][0]["text"] == "on"


def test_connections_beyond_the_number_allowed_are_closed(strict: Running) -> None:
    idle = [raw(strict, b"P") for _ in range(8)]
    with pytest.raises(OSError):
        strict.ask("/health")
    for each in idle:
        everything(each)
    assert strict.ask("/health")[0] == 200


def test_a_client_that_takes_nothing_hinders_nobody(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its stream is more than the buffers of its connection hold."""
    from apt_plugins.serve import application

    monkeypatch.setattr(application, "SEND_SECONDS", 0.3)
    body = json.dumps(
        {"prompt": ["a"] * 8, "stream": True, "max_tokens": 400, "logprobs": 20}
    ).encode()
    with running_server(endless=True, send_buffer=4096) as server:
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        stalled.connect(server.place)
        stalled.sendall(head(server, f"Content-Length: {len(body)}") + body)
        other = server.ask(COMPLETIONS, {"prompt": "say hello", "max_tokens": 5})
        assert other[1]["choices"][0]["text"] == "hello"
        server.until(lambda: server.open_answers() == 0)
        server.until(lambda: "the client took nothing" in capfd.readouterr().err)
        stalled.close()
