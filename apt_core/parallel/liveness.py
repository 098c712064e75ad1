"""Whether the other processes of a run are alive, watched beside what they compute.

A collective of NCCL waits for a process that has died as for one that is slow, and only ending the
communication gives the host and the GPU back to those that wait. So a thread of each process looks
for the others: at those on its machine, and in the store through which they have found each other,
where every process leaves signs of life, and one that has lost another says so.
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
"""How often a process looks for one on its machine that has ended, and for what others say."""

BEAT_SECONDS = 10.0
"""How often a process leaves a sign of life. The store of --nproc is a file, to which each adds."""

SILENT_SECONDS = 120.0
"""After how long without a sign of life a process does not answer. One on this machine that
computes is alive, though no thread of it can say so."""

SLACK_SECONDS = 5.0
"""By how much a thread may wake late in a process that has not stood still. Also how long the end
of a process may be that of the run, where nothing can be asked."""

STOPPING_SECONDS = 15.0
"""How long the end of a run waits for the thread, which may be waiting for the store."""

Value = TypeVar("Value")


class Liveness:
    """Watches the other processes of a run while :meth:`watching` lasts.

    ``lost`` says which of them is gone, or is empty. It raises nothing by itself: a process that
    needs no other any more may end well.
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

        ``pids`` are the processes by rank, None for those on other machines. ``connect`` opens the
        store, over a connection that nothing else waits for.
        """
        self.lost, self._given_up = "", False
        watch = _Watch(self, connect, run, rank, pids)
        watch.start()
        try:
            yield
            watch.stop(failed=False)
        except BaseException:
            watch.stop(failed=True)
            # Whoever waits for the collectives of this process to end would wait for the others.
            self.give_up()
            raise

    def give_up(self) -> None:
        """End what the GPU waits for in vain; what it should have computed is lost. Raises
        nothing, and returns when the GPU goes on."""
        with self._lock:
            if self._given_up:
                return
            self._given_up = True
            try:
                end_collectives()
            except (RuntimeError, ValueError) as error:
                log.error("the communication of this process cannot be ended: %s", one_line(error))

    def lose(self, how: str) -> None:
        """Another process is gone."""
        self.lost = how
        self.give_up()

    def require_others(self) -> None:
        """Raise ProcessLostError where one of the other processes is gone."""
        if self.lost:
            raise lost_error(self.lost)


def lost_error(how: str) -> ProcessLostError:
    return ProcessLostError(f"another process of the run has ended or does not answer ({how})")


def end_collectives() -> None:
    """End what NCCL has under way in this process and whatever begins later: kernels return and
    leave their tensors as they are. Gloo knows nothing like it."""
    known = distributed_c10d._world.pg_names
    groups = [g for g in known if any(d.type == "cuda" for d in g._device_types)]
    if not groups:
        return
    backend = groups[0]._get_backend(torch.device("cuda"))
    # One by one, the end of a communicator may wait for another, as torch says where it does this.
    together = getattr(backend, "_group_start", None)
    if together is not None:
        together()
    for group in sorted(groups, key=lambda group: known[group], reverse=True):
        group.abort()
    if together is not None:
        backend._group_end()


class _Watch:
    """The thread. It watches every process on this machine, and the signs of life of the next."""

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
                # Without such a handle (an old kernel, a sandbox) there are the signs of life.
                with suppress(OSError, AttributeError):
                    self._handles[rank] = os.pidfd_open(pid)
        self._thread.start()

    def stop(self, *, failed: bool) -> None:
        """The run of this process is over: tell the others how, and end the thread."""
        self._failed = failed
        self._stopped.set()
        self._thread.join(STOPPING_SECONDS)

    def _watch(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            if how := self._look():
                self._say("lost", how)
                self._liveness.lose(how)
                self._stopped.wait()
        if self._failed:
            self._say("lost", f"process {self._rank} has failed")
        self._say(f"{self._rank} ended", "")
        for handle in self._handles.values():
            os.close(handle)

    def _look(self) -> str:
        """Look once; says which process is gone, and how, or nothing."""
        now = time.monotonic()
        if now - self._looked > LOOK_SECONDS + SLACK_SECONDS:
            self._heard = now  # this process has stood still, and so may have the others
        self._looked = now
        if now >= self._beat_due:
            self._beat_due, self._beats = now + BEAT_SECONDS, self._beats + 1
            self._say(f"{self._rank} beats", str(self._beats))
        return self._ask("lost") or self._ended_here(now) or self._silent(now)

    def _ended_here(self, now: float) -> str:
        """Which process on this machine has ended without having said so."""
        poll = select.poll()
        for handle in self._handles.values():
            poll.register(handle, select.POLLIN)
        ended = {handle for handle, _ in poll.poll(0)}
        for rank, handle in [*self._handles.items()]:
            if handle not in ended:
                continue
            if self._ask(f"{rank} ended") is not None:
                os.close(self._handles.pop(rank))
                continue
            # Nothing can be asked: the store may have gone with its keeper, at the end of the run.
            since = self._ended_at.setdefault(rank, now)
            if self._store is not None or now - since > SLACK_SECONDS:
                return f"process {rank} has ended"
        return ""

    def _silent(self, now: float) -> str:
        """The next process, if it does not answer. On this machine it is killed: Gloo waits for
        one that is stopped, and notices that one is dead."""
        rank = self._next
        signs = self._ask(f"{rank} beats"), self._computed(rank)
        if self._store is None or signs != self._signs or self._ask(f"{rank} ended") is not None:
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

    def _computed(self, rank: int) -> str:
        """For how long a process on this machine has computed. It is alive, too, where Python lets
        no other thread run, as in a search through gigabytes."""
        if rank not in self._handles:
            return ""
        with suppress(OSError):
            fields = Path(f"/proc/{self._pids[rank]}/stat").read_text().rpartition(")")[2].split()
            return " ".join(fields[11:13])
        return ""

    # The store -------------------------------------------------------------------------------

    def _say(self, what: str, text: str) -> None:
        self._reach(lambda store: store.set(f"{self._run}/{what}", text))

    def _ask(self, what: str) -> str | None:
        """What another process has said, or None: nothing, or nothing can be asked."""
        key = f"{self._run}/{what}"
        return self._reach(lambda store: store.get(key).decode() if store.check([key]) else None)

    def _reach(self, use: Callable[[dist.Store], Value]) -> Value | None:
        """Use the store. Where whoever keeps it does not answer the next use tries again; what was
        not heard meanwhile says nothing of other processes."""
        try:
            self._store = self._store or self._connect()
            return use(self._store)
        except (RuntimeError, OSError):  # torch's DistError is one
            self._store = None
            return None
