"""Puts the parts of a server together, and runs it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from apt_core.error_text import one_line
from apt_core.errors import AptError
from apt_core.inference import Engine
from apt_core.inference.chat import ChatFormat, format_of
from apt_core.parallel.signals import Interrupts
from apt_core.runs import Session
from apt_plugins.serve.access import Access
from apt_plugins.serve.application import Application, Later, by_the_loop
from apt_plugins.serve.http_server import Server
from apt_plugins.serve.limits import Limits
from apt_plugins.serve.prompts import Prompts
from apt_plugins.serve.worker import Worker

JOIN_SECONDS = 5.0


def serve_session(
    session: Session,
    sock: socket.socket,
    access: Access,
    limits: Limits,
    *,
    model: str,
    chat_format: ChatFormat | None = None,
    log_access: bool = True,
    int8: bool = False,
    compiled: bool = False,
    ready: Callable[[str], None] = lambda line: None,
    interrupts: Interrupts | None = None,
    later: Later = by_the_loop,
) -> int:
    """Serve the model of ``session`` at ``sock`` until a signal; returns the exit code. ``ready``
    is called once requests are answered, with a line on what is served.

    Raises AptError where the thread of the engine ended.
    """
    if chat_format is None:
        chat_format = format_of(session)
    worker = Worker(
        lambda: Engine(session, max_batch=limits.max_batch, int8=int8, compiled=compiled),
        max_answers=limits.max_answers,
    )
    application = Application(
        session, worker, Prompts(session, chat_format), limits, access,
        model=model, log_access=log_access, later=later,
    )  # fmt: skip
    interrupts = Interrupts() if interrupts is None else interrupts
    server = Server(application, worker, limits, interrupts)

    async def serve() -> None:
        serving = asyncio.create_task(server.serve([sock]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        if server.started:
            ready(f"serving {model}, step {session.position.step:,}")
        await serving

    worker.start()
    with interrupts.listening():
        try:
            asyncio.run(serve())
        finally:
            worker.stop(JOIN_SECONDS)
    if worker.failure is not None:
        raise AptError(f"the engine ended: {one_line(worker.failure)}") from worker.failure
    return interrupts.exit_code
