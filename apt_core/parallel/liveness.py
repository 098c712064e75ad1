"""Watches on a thread whether the other processes of a run are alive.

An NCCL collective waits for a dead process as for a slow one; only aborting the communication
releases the host and the GPU. So a thread of each process watches the processes on its machine, and
reads the shared store, where each process writes heartbeats, and reports when it has lost another.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from apt_core.error_text import one_line
from apt_core.errors import ProcessLostError
from apt_core.log import get_logger

log = get_logger("apt.training")

LOOK_SECONDS = 1.0
"""Seconds between checks for ended processes on this machine and for reports of others."""

BEAT_SECONDS = 10.0
"""Seconds between heartbeats. They are rare because the store of --nproc is a file that grows."""

SILENT_SECONDS = 120.0
"""Seconds without a heartbeat after which a process counts as lost. A process on this machine also
counts as alive while it uses CPU time, since a busy one may not get to its heartbeat."""

SLACK_SECONDS = 5.0
"""Seconds by which a thread may wake late in a process that was not suspended. Also how long an
ended process is not reported while the store does not answer: the run may be ending."""

STOPPING_SECONDS = 15.0
"""Seconds that the end of a run waits for the thread, which may be waiting for the store."""

Value = TypeVar("Value")


class Liveness:
    """Watches the other processes of a run while :meth:`watching` lasts.

    ``lost`` says which process is gone, or is empty. It raises no error: a process that does not
    need the others any more may still end successfully.
    """

    def __init__(self) -> None:
        self.lost = ""
        self._given_up = False
        self._lock = threading.Lock()

    @contextmanager
    def watching(
        self, connect: Callable[[], dist.Store], run: str, rank: int, pids: Sequence[int | None]
    ) -> Iterator[None]:
        """Watch in process ``rank`` of ``run``, a name that no other run in the store has.

        ``pids`` are the process ids by rank, None for those on other machines. ``connect`` opens
        the store over a connection of its own.
        """
        self.lost, self._given_up = "", False
        watch = _Watch(self, connect, run, rank, pids)
        watch.start()
        try:
            yield
            watch.stop(failed=False)
        except BaseException:
            watch.stop(failed=True)
            # Waiting for this process's collectives would mean waiting for a lost process.
            self.give_up()
            raise

    def give_up(self) -> None:
        """Abort the collectives that wait for a lost process; their results are lost. Never raises;
        returns when the GPU goes on."""
        with self._lock:
            if self._given_up:
                return
            self._given_up = True
            try:
                end_collectives()
            except (RuntimeError, ValueError) as error:
                log.error("the communication of this process cannot be ended: %s", one_line(error))

    def lose(self, how: str) -> None:
        """Record that another process is gone, and abort collectives."""
        self.lost = how
        self.give_up()

    def require_others(self) -> None:
        """Raise ProcessLostError if another process is gone."""
        if self.lost:
            raise lost_error(self.lost)


def lost_error(how: str) -> ProcessLostError:
    return ProcessLostError(f"another process of the run has ended or does not answer ({how})")


def end_collectives() -> None:
    """Abort the present and later NCCL collectives of this process: kernels return and leave their
    tensors unchanged. Gloo cannot do this."""
    known = distributed_c10d._world.pg_names
    groups = [g for g in known if any(d.type == "cuda" for d in g._device_types)]
    if not groups:
        return
    backend = groups[0]._get_backend(torch.device("cuda"))
    # Aborted as a group: one by one, the abort of a communicator may wait for another.
    together = getattr(backend, "_group_start", None)
    if together is not None:
        together()
    for group in sorted(groups, key=lambda group: known[group], reverse=True):
        group.abort()
    if together is not None:
        backend._group_end()


class _Watch:
    """The thread: watches every process on this machine, and the heartbeats of the next rank."""

    def __init__(
        self,
        liveness: Liveness,
        connect: Callable[[], dist.Store],
        run: str,
        rank: int,
        pids: Sequence[int | None],
    ) -> None:
        self._liveness, self._connect = liveness, connect
        self._run, self._rank, self._pids = f"apt/alive/{run}", rank, pids
        self._next = (rank + 1) % len(pids)
        self._store: dist.Store | None = None
        self._handles: dict[int, int] = {}
        self._ended_at: dict[int, float] = {}
        self._looked = self._heard = time.monotonic()
        self._beat_due, self._beats = 0.0, 0
        self._signs: tuple[str | None, str] = (None, "")
        self._failed = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._watch,), name="apt-liveness", daemon=True
        )

    def start(self) -> None:
        for rank, pid in enumerate(self._pids):
            if pid is not None and rank != self._rank:
                # Without a pidfd (an old kernel, a sandbox) the heartbeats remain.
                with suppress(OSError, AttributeError):
                    self._handles[rank] = os.pidfd_open(pid)
        self._thread.start()

    def stop(self, *, failed: bool) -> None:
        """Report to the others how this process's run has ended, and end the thread."""
        self._failed = failed
        self._stopped.set()
        self._thread.join(STOPPING_SECONDS)

    def _watch(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            if how := self._check():
                self._write("lost", how)
                self._liveness.lose(how)
                self._stopped.wait()
        if self._failed:
            self._write("lost", f"process {self._rank} has failed")
        self._write(f"{self._rank} ended", "")
        for handle in self._handles.values():
            os.close(handle)

    def _check(self) -> str:
        """Check once. Returns which process is gone, and how, or an empty text."""
        now = time.monotonic()
        if now - self._looked > LOOK_SECONDS + SLACK_SECONDS:
            self._heard = now  # this process was suspended, and so perhaps the others
        self._looked = now
        if now >= self._beat_due:
            self._beat_due, self._beats = now + BEAT_SECONDS, self._beats + 1
            self._write(f"{self._rank} beats", str(self._beats))
        return self._read("lost") or self._ended_here(now) or self._silent(now)

    def _ended_here(self, now: float) -> str:
        """Which process on this machine has ended without a report, or an empty text."""
        poll = select.poll()
        for handle in self._handles.values():
            poll.register(handle, select.POLLIN)
        ended = {handle for handle, _ in poll.poll(0)}
        for rank, handle in [*self._handles.items()]:
            if handle not in ended:
                continue
            if self._read(f"{rank} ended") is not None:
                os.close(self._handles.pop(rank))
                continue
            # Without the store: the launcher may have closed it at the end of the run.
            since = self._ended_at.setdefault(rank, now)
            if self._store is not None or now - since > SLACK_SECONDS:
                return f"process {rank} has ended"
        return ""

    def _silent(self, now: float) -> str:
        """Whether the process of the next rank is silent, as a text or empty. On this machine it is
        killed: Gloo would wait for a stopped process, but notices a dead one."""
        rank = self._next
        signs = self._read(f"{rank} beats"), self._cpu_time(rank)
        if self._store is None or signs != self._signs or self._read(f"{rank} ended") is not None:
            self._signs, self._heard = signs, now
        silent = now - self._heard
        if silent < SILENT_SECONDS:
            return ""
        how = f"process {rank} has not answered for {silent:.0f} s"
        if rank in self._handles:
            log.warning("%s: it is killed", how)
            with suppress(OSError):
                signal.pidfd_send_signal(self._handles[rank], signal.SIGKILL)
        return how

    def _cpu_time(self, rank: int) -> str:
        """The CPU time of a process on this machine. It grows also while Python lets no other
        thread run, as in a search through gigabytes."""
        if rank not in self._handles:
            return ""
        with suppress(OSError):
            fields = Path(f"/proc/{self._pids[rank]}/stat").read_text().rpartition(")")[2].split()
            return " ".join(fields[11:13])
        return ""

    # The store -------------------------------------------------------------------------------

    def _write(self, what: str, text: str) -> None:
        self._use_store(lambda store: store.set(f"{self._run}/{what}", text))

    def _read(self, what: str) -> str | None:
        """What a process has written, or None if it wrote nothing or the store does not answer."""
        key = f"{self._run}/{what}"
        return self._use_store(
            lambda store: store.get(key).decode() if store.check([key]) else None
        )

    def _use_store(self, use: Callable[[dist.Store], Value]) -> Value | None:
        """Call ``use`` with the store, or return None if it does not answer; the next call then
        connects anew."""
        try:
            self._store = self._store or self._connect()
            return use(self._store)
        except (RuntimeError, OSError):  # torch's DistError is a RuntimeError
            self._store = None
            return None
