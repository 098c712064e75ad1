"""Servers in a thread of this process."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("torch", reason="text is generated with torch")
pytest.importorskip("starlette", reason="the server's library is not installed")
pytest.importorskip("uvicorn", reason="the server's library is not installed")

from apt_core import hookimpl
from apt_core.parallel.signals import Interrupts
from apt_core.runs import Session
from apt_plugins.serve.access import Access
from apt_plugins.serve.application import Later, by_the_loop
from apt_plugins.serve.http_server import bound_socket, resolved, url_of
from apt_plugins.serve.limits import Limits
from apt_plugins.serve.serving import serve_session
from tests.inference.conftest import lively_session

SECONDS = 60
"""What a test waits for comes before."""


class Script:
    """A plugin that lets a prompt decide its answer: ``say TEXT`` is answered with TEXT; ``wait``
    with a token for each turn of the gate, without end; ``break`` fails."""

    def __init__(self) -> None:
        self.turns = threading.Semaphore(0)

    @hookimpl
    def apt_decoder(self, request: Any, session: Session) -> Any:
        prompt = request.prompt if isinstance(request.prompt, str) else request.prompt[-1].content
        if prompt.startswith("say "):
            return _Planned(session, prompt[4:])
        if prompt.startswith("wait"):
            return _Waiting(self.turns)
        if prompt.startswith("break"):
            raise RuntimeError("broken on purpose")
        return None


class _Planned:
    def __init__(self, session: Session, text: str) -> None:
        self.ids, self.end = iter(session.tokenizer.encode(text)), session.tokenizer.special.eos

    def choose(self, input_ids: Any, logits: Any) -> int:
        return next(self.ids, self.end or 0)


class _Waiting:
    def __init__(self, turns: threading.Semaphore) -> None:
        self.turns = turns

    def choose(self, input_ids: Any, logits: Any) -> int:
        assert self.turns.acquire(timeout=SECONDS)
        return ord("w")


@dataclass
class Running:
    """A server at ``url``. ``turns`` is what its waiting answers take their tokens from."""

    url: str
    interrupts: Interrupts
    thread: threading.Thread
    turns: threading.Semaphore
    lines: list[str] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)

    @property
    def place(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any, dict[str, str]]:
        """The status, the JSON or the bytes, and the headers of an answer."""
        connection = http.client.HTTPConnection(*self.place, timeout=SECONDS)
        try:
            given = {} if body is None else {"Content-Type": "application/json"}
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            kind = method or ("GET" if body is None else "POST")
            connection.request(kind, path, data, {**given, **(headers or {})})
            response = connection.getresponse()
            content = response.read()
            found = {name.lower(): value for name, value in response.getheaders()}
            parsed = found.get("content-type", "").startswith("application/json")
            return response.status, json.loads(content) if parsed else content, found
        finally:
            connection.close()

    def open_answers(self) -> int:
        return int(self.ask("/health")[1]["answers"])

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    def drain(self) -> None:
        """Give waiting answers their turns until none is left."""

        def drained() -> bool:
            self.turns.release()
            return self.open_answers() == 0

        self.until(drained)

    def stop(self) -> int:
        self.interrupts.received = signal.SIGTERM
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        return self.exit_codes[0]


@contextmanager
def running_server(
    session: Session | None = None,
    limits: Limits | None = None,
    *,
    key: str | None = None,
    names: tuple[str, ...] = (),
    endless: bool = False,
    send_buffer: int | None = None,
    later: Later = by_the_loop,
) -> Iterator[Running]:
    script = Script()
    session = session or lively_session(script, endless=endless, strict=False)
    limits = limits or Limits()
    sock = bound_socket(*resolved("127.0.0.1", 0))
    if send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    begun, interrupts = threading.Event(), Interrupts()

    def run() -> None:
        with sock:
            access = Access("127.0.0.1", "127.0.0.1", names, key)
            code = serve_session(
                session, sock, access, limits,
                model="tiny", interrupts=interrupts, ready=ready, later=later,
            )  # fmt: skip
            running.exit_codes.append(code)

    def ready(line: str) -> None:
        running.lines.append(line)
        begun.set()

    thread = threading.Thread(target=run, daemon=True)
    running = Running(url_of(sock), interrupts, thread, script.turns)
    thread.start()
    try:
        assert begun.wait(SECONDS)
        yield running
    finally:
        script.turns.release(1_000_000)
        running.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_server() as found:
        yield found
