"""The engine of Ray: tasks of a cluster, or of processes that Ray starts here, encode the chunks.

``RAY_ADDRESS`` names the cluster, whose machines need this package, and the tokenizer's, at the
same versions. A task whose process or machine is lost is done again elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apt_core.data.store.chunks import CHUNK_CHARS, ChunkEncoder, name_of, unpack_chunk
from apt_core.data.store.format import StoreError
from apt_core.data.store.frames import pack, unpack
from apt_core.data.store.local import AHEAD, ATTEMPTS, THREADS, result_of_answer, run_local
from apt_core.data.store.transfer import NotTransferableError, describe_tokenizer, make_tokenizer
from apt_core.error_text import one_line
from apt_core.errors import ConfigError
from apt_core.log import get_logger

log = get_logger("apt.data")

INSTALL = 'pip install "apt-kernel[ray]"'

REACHED_IN = 10.0
"""Seconds in which a cluster has to answer."""

_encoders: dict[str, ChunkEncoder] = {}
"""In a process of Ray: what it encodes with, by the hash of what that was made of."""


def run_ray(
    encoder: ChunkEncoder, chunks: Iterable[bytes], workers: int, folder: Path
) -> Iterator[bytes]:
    """The results of the chunks, in their order. Of Ray's own processes here there are ``workers``;
    a cluster gives all its cores.

    A tokenizer that the tasks cannot make, or of which they make other ids, is used here instead,
    which the log says. Raises the errors of the encoder, ConfigError without Ray or its cluster,
    and StoreError for a chunk that no process brings to an end.
    """
    ray = _imported()
    source = iter(chunks)
    first = next(source, None)
    if first is None:
        return
    expected = encoder(first)
    yield expected
    with _connected(ray, workers) as limit:
        try:
            tasks = Tasks(ray, encoder, folder / "ray")
            if tasks.result(first, tasks.start(first)) != expected:
                raise NotTransferableError("its ids are others there")
        except NotTransferableError as error:
            log.warning("%s is not used on Ray: %s", name_of("tokenizer", encoder.tokenizer), error)
        else:
            yield from tasks.results(source, limit)
            return
    yield from run_local(encoder, source, workers, folder)


class Tasks:
    """Tasks that do what ``encoder`` does; its tokenizer is saved in ``folder`` for them. Raises
    NotTransferableError."""

    def __init__(self, ray: Any, encoder: ChunkEncoder, folder: Path) -> None:
        row = describe_tokenizer(encoder.tokenizer, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        header = {
            "sys_path": [os.path.abspath(path) for path in sys.path],
            "tokenizer": row,
            "settings": encoder.settings.row(),
            "rule": asdict(encoder.rule),
            "files": [str(path.relative_to(folder)) for path in files],
        }
        setup = pack(header, [path.read_bytes() for path in files])
        self._ray = ray
        self._key = hashlib.sha256(setup).hexdigest()
        self._setup = [ray.put(setup)]  # in a list it is fetched only where it is not known
        self._encode = ray.remote(encode).options(max_retries=ATTEMPTS - 1)

    def start(self, chunk: bytes) -> Any:
        """Begin with a chunk."""
        return self._encode.remote(self._key, self._setup, chunk)

    def result(self, chunk: bytes, task: Any) -> bytes:
        """The result of a chunk. Raises what the encoder raised, NotTransferableError where the
        process has no encoder, StoreError where no process brings it to an end."""
        try:
            refused, answer = self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            raise NotTransferableError(one_line(error.cause or error)) from error
        except self._ray.exceptions.RayError as error:
            documents = unpack_chunk(chunk)[1]
            raise StoreError(
                f"Ray cannot encode the documents from {documents[0].where} to "
                f"{documents[-1].where} (up to {ATTEMPTS} attempts): {one_line(error)}"
            ) from error
        if refused:
            raise NotTransferableError(refused)
        return result_of_answer(answer)

    def results(self, chunks: Iterator[bytes], limit: int) -> Iterator[bytes]:
        """The results of the chunks, in their order, ``limit`` of which may be worked on."""
        waiting: deque[tuple[bytes, Any]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, self.start(chunk)))
                if len(waiting) >= limit:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:
            for _, task in waiting:
                self._ray.cancel(task)

    def _next(self, waiting: deque[tuple[bytes, Any]]) -> bytes:
        try:
            return self.result(*waiting.popleft())
        except NotTransferableError as error:
            raise StoreError(f"a process of Ray cannot encode: {error}") from error


def encode(key: str, setup: list[Any], chunk: bytes) -> tuple[str, bytes]:
    """Run as a task: why there is no encoder, or the answer to a chunk."""
    from apt_core.data.store.worker import answer

    if key not in _encoders:
        import ray

        try:
            _encoders[key] = _encoder_of(ray.get(setup[0]))
        except Exception as error:
            return one_line(error), b""
    return "", answer(_encoders[key], chunk)


def _encoder_of(setup: bytes) -> ChunkEncoder:
    from apt_core.data.pipeline.prepare import PipelineSettings
    from apt_core.data.pipeline.split import SplitRule

    os.environ.update(THREADS)
    header, blocks = unpack(setup)
    # On this machine the tokenizer may be where only the process that builds looks.
    sys.path += [path for path in header["sys_path"] if path not in sys.path]
    with tempfile.TemporaryDirectory(prefix="apt-tokenizer-") as folder:
        for name, block in zip(header["files"], blocks, strict=True):
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(block)
        tokenizer = make_tokenizer({**header["tokenizer"], "folder": folder})
    settings, rule = PipelineSettings(**header["settings"]), SplitRule(**header["rule"])
    return ChunkEncoder(tokenizer, settings, rule)


def _imported() -> Any:
    if not os.environ.get("RAY_ADDRESS"):
        # Read at the import. Without it Ray replaces 127.0.0.1 by an address that others reach.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        message = f"the engine ray needs Ray, which cannot be imported ({one_line(error)})"
        raise ConfigError(message, hint=INSTALL) from error
    return ray


@contextmanager
def _connected(ray: Any, workers: int) -> Iterator[int]:
    """While the context lasts there is a cluster; how many chunks may be worked on at a time."""
    if ray.is_initialized():
        yield _limit(ray)
        return
    address, handler = os.environ.get("RAY_ADDRESS"), signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"address": address}
    if not address:
        options = {
            "address": "local",
            "num_cpus": workers,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
            # A chunk has up to four bytes a character, as its result has a token, and marks beside.
            "object_store_memory": (80 << 20) + workers * (1 + AHEAD) * 10 * CHUNK_CHARS,
            # Without it a task that needs too much memory is begun again for ever.
            "_system_config": {"task_oom_retries": ATTEMPTS - 1},
        }
    try:
        if address:
            _require_reachable(address)
        ray.init(**options, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:
        where = f"the cluster at {address}" if address else "a cluster here"
        message = f"--engine ray cannot use {where}: {one_line(error)}"
        raise ConfigError(message, hint="start one with ray start --head") from error
    try:
        yield _limit(ray)
    finally:
        ray.shutdown()
        # Ray has put its own in its place.
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _require_reachable(address: str) -> None:
    """Raise OSError where nobody listens; Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), REACHED_IN).close()


def _limit(ray: Any) -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1))) * (1 + AHEAD)
