"""A worker process of a build: gets chunks by a pipe and answers with their results."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import BinaryIO


def main() -> None:
    """Serve until the pipe ends, with the process that builds at the latest."""
    # Who pressed Ctrl-C asks the builder, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    # What libraries print must not come between the answers.
    os.dup2(2, 1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    with contextlib.suppress(BrokenPipeError):
        serve(requests, answers)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer the messages of a stream: the first says what to work with, each other is a chunk."""
    from apt_core.data.store.frames import pack, receive, send, unpack

    first = receive(requests)
    if first is None:
        return
    header, _ = unpack(first)
    sys.path[:] = header["sys_path"]
    try:
        from apt_core.data.pipeline.prepare import PipelineSettings
        from apt_core.data.pipeline.split import SplitRule
        from apt_core.data.store.chunks import ChunkEncoder
        from apt_core.data.store.transfer import make_tokenizer

        tokenizer = make_tokenizer(header["tokenizer"])
        settings, rule = PipelineSettings(**header["settings"]), SplitRule(**header["rule"])
        encoder = ChunkEncoder(tokenizer, settings, rule)
    except BaseException as error:
        from apt_core.error_text import one_line

        send(answers, pack({"refused": one_line(error)}))
        return
    send(answers, pack({"ready": os.getpid()}))
    while (chunk := receive(requests)) is not None:
        send(answers, answer(encoder, chunk))


def answer(encoder: Callable[[bytes], bytes], chunk: bytes) -> bytes:
    """The result of a chunk, after one byte that says whether it is one or an error."""
    from apt_core.data.store.frames import pack
    from apt_core.error_text import one_line
    from apt_core.errors import ConfigError, ProviderError

    try:
        return b"\0" + encoder(chunk)
    except ConfigError as error:
        rows = [[p.message, p.key, p.where, p.hint] for p in error.problems]
        return b"\1" + pack({"problems": rows})
    except ProviderError as error:
        return b"\1" + pack({"provider": str(error)})
    except BaseException as error:
        return b"\1" + pack({"other": one_line(error)})
