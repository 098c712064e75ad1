"""The server's socket, its connections, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import socket
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from apt_core import ConfigError
from apt_core.parallel.signals import Interrupts
from apt_plugins.serve.application import Application
from apt_plugins.serve.limits import Limits
from apt_plugins.serve.worker import Worker

BACKLOG = 128


def resolved(host: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """The address of ``host``. Raises ConfigError if there is none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        message = f"{host!r} is no address of this machine: {error}"
        raise ConfigError(message, key="--host") from error
    # localhost may have both; clients try IPv4 in any case.
    found.sort(key=lambda row: row[0] != socket.AF_INET)
    family, _, _, _, address = found[0]
    return family, address


def bound_socket(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    """A socket that is bound and does not listen yet. Raises ConfigError where that fails."""
    taken = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A port whose last server has just ended is free; one with a server is not.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        # Two sockets may be bound to a port as long as none listens: find that out now.
        taken.listen(BACKLOG)
    except OSError as error:
        taken.close()
        raise _unusable(error, address) from error
    return taken


def _unusable(error: OSError, address: tuple[Any, ...]) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port {address[1]} is in use: another server runs there",
            key="--port",
            hint="choose another; 0 takes any that is free",
        )
    key = "--port" if error.errno == errno.EACCES else "--host"
    return ConfigError(f"cannot listen on {address[0]}, port {address[1]}: {error.strerror}", key)


def url_of(sock: socket.socket) -> str:
    """The URL of the server at a socket."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Serves ``application`` until ``interrupts`` or its worker's failure end it. Answers that are
    being made then have ``shutdown_timeout`` seconds."""

    def __init__(
        self, application: Application, worker: Worker, limits: Limits, interrupts: Interrupts
    ) -> None:
        self._worker, self._limits, self._interrupts = worker, limits, interrupts

        class Protocol(_Protocol):
            read_timeout, max_connections = limits.read_timeout, limits.max_connections

        super().__init__(
            uvicorn.Config(
                application,
                loop="asyncio",
                http=Protocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=5,
                backlog=BACKLOG,
                timeout_graceful_shutdown=int(limits.shutdown_timeout) + 5,
            )
        )

    def capture_signals(self) -> AbstractContextManager[None]:
        """The interrupts do that."""
        return nullcontext()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end."""
        if self._interrupts or self._worker.failure is not None:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take on nothing more, and wait for what is being answered."""
        self._worker.close()
        end = asyncio.get_running_loop().call_later(
            self._limits.shutdown_timeout, self._worker.end_all
        )
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()


class _Protocol(H11Protocol):
    """Closes connections whose request does not come, and those beyond the number allowed. The
    application may abort a connection that takes nothing."""

    app_state: dict[str, Any]
    read_timeout: float
    max_connections: int
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        if len(self.connections) > self.max_connections:
            transport.abort()
            return
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unexpect()
        super().connection_lost(exc)

    def _expect(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._unexpect()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.read_timeout, self._give_up)

    def _unexpect(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
