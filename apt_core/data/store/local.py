"""The engine of local processes: chunks are encoded by all cores of this machine."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, cast

from apt_core.data.store.chunks import ChunkEncoder, chunk_size, name_of, unpack_chunk
from apt_core.data.store.format import StoreError
from apt_core.data.store.frames import pack, receive, send, unpack
from apt_core.data.store.transfer import NotTransferableError, describe_tokenizer
from apt_core.errors import AptError, ConfigError, Problem, ProviderError
from apt_core.log import get_logger

log = get_logger("apt.data")

START_AFTER = 4 << 20
"""Bytes of text that are encoded before other processes are started, which takes half a second."""

AHEAD = 2
"""Chunks a worker that may be in memory beyond those being worked on."""

ATTEMPTS = 3
"""How often a chunk is begun whose worker is killed."""

THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")} | {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
}
"""One thread a worker: there is one of them a core."""


class WorkerLostError(Exception):
    """A worker process has ended; says how."""


def available_cores() -> int:
    """The cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def run_local(
    encoder: ChunkEncoder, chunks: Iterable[bytes], workers: int, folder: Path
) -> Iterator[bytes]:
    """The results of the chunks, in their order; with one worker, for little text, and for a
    tokenizer that no other process can make, in this process.

    Raises the errors of the encoder, and StoreError for a chunk whose workers die.
    """
    source = iter(chunks)
    size = 0
    sample: tuple[bytes, bytes] | None = None
    for chunk in source:
        result = encoder(chunk)
        sample = sample or (chunk, result)
        size += chunk_size(chunk)
        yield result
        if workers > 1 and size >= START_AFTER:
            break
    else:
        return
    try:
        pool = Pool(encoder, workers, folder, sample)
    except NotTransferableError as error:
        name = name_of("tokenizer", encoder.tokenizer)
        log.warning("%s encodes in one process: %s", name, error)
        yield from map(encoder, source)
        return
    with pool:
        yield from pool.results(source)


class Task:
    """A chunk, and its result when it is ``done``."""

    def __init__(self, chunk: bytes) -> None:
        self.chunk = chunk
        self.result = b""
        self.error: BaseException | None = None
        self.done = threading.Event()


class Pool:
    """Worker processes, each with a thread that waits for it.

    ``sample`` is a chunk with its result, on which each of them is tried. Raises
    NotTransferableError where they cannot have the tokenizer.
    """

    def __init__(
        self, encoder: ChunkEncoder, workers: int, folder: Path, sample: tuple[bytes, bytes]
    ) -> None:
        if not sys.executable:
            raise NotTransferableError("it is not known which Python runs")
        row = describe_tokenizer(encoder.tokenizer, folder / "tokenizer")
        self._first = pack(
            {
                "sys_path": [path or os.getcwd() for path in sys.path],
                "tokenizer": row,
                "settings": encoder.settings.row(),
                "rule": asdict(encoder.rule),
            }
        )
        self._sample = sample
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._closing = False
        self._workers = [Worker() for _ in range(workers)]
        self._threads: list[threading.Thread] = []
        try:
            for worker in self._workers:
                worker.start(self._first)
            for worker in self._workers:
                self._try(worker)
        except BaseException:
            self.close()
            raise
        for worker in self._workers:
            thread = threading.Thread(target=self._serve, args=(worker,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def results(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The results of the chunks, in their order."""
        waiting: deque[Task] = deque()
        for chunk in chunks:
            task = Task(chunk)
            waiting.append(task)
            self._tasks.put(task)
            while waiting and (
                waiting[0].done.is_set() or len(waiting) >= len(self._workers) * (1 + AHEAD)
            ):
                yield self._result_of(waiting.popleft())
        while waiting:
            yield self._result_of(waiting.popleft())

    def close(self) -> None:
        """End the workers, whatever they do, and wait for them."""
        self._closing = True
        for worker in self._workers:
            worker.kill()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.close()

    def _result_of(self, task: Task) -> bytes:
        task.done.wait()
        if task.error is not None:
            raise task.error
        return task.result

    def _try(self, worker: Worker) -> None:
        """Wait until a worker is ready and does what this process does."""
        try:
            header, _ = unpack(worker.receive())
            if "refused" in header:
                raise NotTransferableError(header["refused"])
            chunk, expected = self._sample
            if worker.work(chunk) != expected:
                raise NotTransferableError("in another process it makes other ids")
        except WorkerLostError as error:
            raise NotTransferableError(f"a process for it {error}") from None

    def _serve(self, worker: Worker) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task.result = self._work(worker, task.chunk)
            except BaseException as error:
                task.error = error
            task.done.set()

    def _work(self, worker: Worker, chunk: bytes) -> bytes:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return worker.work(chunk)
            except WorkerLostError as error:
                if self._closing:
                    raise
                log.warning("a process that encodes %s; its documents are given to another", error)
                last = error
            worker.start(self._first)
            try:
                self._try(worker)
            except NotTransferableError as error:
                if attempt == ATTEMPTS or self._closing:
                    raise StoreError(f"no process can encode any more: {error}") from None
        documents = unpack_chunk(chunk)[1]
        raise StoreError(
            f"{ATTEMPTS} processes ended while they encoded the documents from "
            f"{documents[0].where} to {documents[-1].where}; the last one {last}"
        )


class Worker:
    """A worker process and the pipes to it. Threads: one that works, any that kills."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False
        self._lock = threading.Lock()

    def start(self, first: bytes) -> None:
        """Start the process, in place of one that has ended."""
        self._discard()
        with self._lock:
            if self._ended:
                return
            self._process = subprocess.Popen(
                # Without the working directory, of which no file may stand for a module.
                [sys.executable, "-P", "-c", _COMMAND, _root()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **THREADS},
            )
        with suppress(WorkerLostError):  # told when it should answer
            self.send(first)

    def work(self, chunk: bytes) -> bytes:
        """The result of a chunk. Raises what the encoder did, and WorkerLostError."""
        self.send(chunk)
        return result_of_answer(self.receive())

    def send(self, message: bytes) -> None:
        """Send a message. Raises WorkerLostError."""
        try:
            send(cast("BinaryIO", self._running().stdin), message)
        except (OSError, ValueError):
            raise WorkerLostError(self._how_it_ended()) from None

    def receive(self) -> bytes:
        """The next message. Raises WorkerLostError."""
        try:
            message = receive(cast("BinaryIO", self._running().stdout))
        except (OSError, ValueError):
            message = None
        if message is None:
            raise WorkerLostError(self._how_it_ended())
        return message

    def kill(self) -> None:
        """End the process for good."""
        with self._lock:
            self._ended = True
        self._discard()

    def close(self) -> None:
        """End the process and close the pipes, which no thread may use any more."""
        self.kill()
        if self._process is not None:
            with suppress(OSError):
                self._process.communicate()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise WorkerLostError("was ended")
        return self._process

    def _discard(self) -> None:
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _how_it_ended(self) -> str:
        process = self._running()
        try:
            code = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code >= 0:
            return f"ended with exit code {code}"
        with suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
        return f"was ended by signal {-code}"


_COMMAND = (
    "import sys; sys.path.append(sys.argv[1]); from apt_core.data.store.worker import main; main()"
)


def _root() -> str:
    """The folder from which a process imports this very package."""
    return str(Path(__file__).parents[3])


def result_of_answer(answer: bytes) -> bytes:
    """The result that :func:`apt_core.data.store.worker.answer` has sent. Raises the error that it
    has sent instead."""
    if answer[:1] == b"\0":
        return answer[1:]
    raise _error_of(unpack(answer[1:])[0])


def _error_of(row: dict[str, Any]) -> AptError:
    if "problems" in row:
        return ConfigError([Problem(*problem) for problem in row["problems"]])
    if "provider" in row:
        return ProviderError(row["provider"])
    return StoreError(f"a process that encodes failed: {row['other']}")
