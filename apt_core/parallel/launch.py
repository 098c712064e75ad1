"""Starts a run in several processes on this machine.

The processes find each other through a file in a folder that only their user may enter, and
communicate over the loopback interface: no port is open to other machines, and no other user can
write to their store.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType

import torch

from apt_core.config import Config
from apt_core.parallel.child_process import apt_train_command
from apt_core.parallel.signals import handling
from apt_core.parallel.world import (
    POLL_SECONDS,
    STORE_VARIABLE,
    has_lasting_store,
    shared_store,
)

SHUTDOWN_SECONDS = 600.0
"""Seconds that stopping processes may take to save before they are killed."""

FIRST_SECONDS = 1.0
"""Seconds that another process waits for the first one to report the same error."""

FAILED, BAD_INPUT = 1, 2
"""Exit codes of a process that has printed its error."""

STOPPED = tuple(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))
"""Exit codes of a process that has stopped on a signal; the others then stop too, by agreement."""

REPORTING = (0, FAILED, BAD_INPUT, *STOPPED)
"""Exit codes of apt-train itself."""


def processes_for(config: Config) -> tuple[int, str]:
    """The number of processes of a distributed profile on this machine, one per GPU, and the reason
    if it is lower than ``hardware.num_gpus``."""
    hardware = config.hardware
    there = torch.cuda.device_count() if hardware.device != "cpu" else 0
    if there >= hardware.num_gpus:
        return hardware.num_gpus, ""
    processes = max(1, there)
    return processes, (
        f"hardware.num_gpus: {hardware.num_gpus} asked, {there} usable here: {processes} "
        "process(es); --nproc N starts N, on CPUs too"
    )


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run ``apt-train ARGUMENTS`` in ``processes`` processes. Returns the exit code of the one that
    failed first, or 0. A process that ended with a code that apt-train never returns is named.

    Signals to this process are passed on to all. When one process fails, the others are stopped.
    """
    command = apt_train_command(arguments)
    with tempfile.TemporaryDirectory(prefix="apt-run-") as folder:  # of mode 0700
        workers = _Workers()
        with workers.passing_signals():
            for rank in range(processes):
                workers.start(command, _environment(rank, processes, Path(folder)))
            failed = workers.wait()
    if failed is None:
        return 0
    rank, code = failed
    if code in REPORTING:
        return code
    if workers.passed:
        return 128 + workers.passed
    how = f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code}"
    print(f"error: process {rank} {how}", file=sys.stderr)
    return FAILED


def _environment(rank: int, processes: int, folder: Path) -> dict[str, str]:
    """The environment variables of one process: its rank, and how it connects to the others."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    loopback = _loopback()
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        STORE_VARIABLE: str(folder / "store"),
        # Runs over the network are started by torchrun.
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": f"={loopback}",
    }


def _loopback() -> str:
    """The name of the loopback interface."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    return min(names, key=len, default="lo")


class _Workers:
    """The processes of a run. ``passed`` is the first signal that was passed on to them, or 0."""

    def __init__(self) -> None:
        self.passed = 0
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._deadline = float("inf")

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the next process, in its own session: Ctrl-C at a terminal reaches it through this
        process only."""
        rank = len(self._running)
        self._running[rank] = subprocess.Popen(command, env=environment, start_new_session=True)
        if self.passed:  # a signal arrived while processes were being started
            self._running[rank].send_signal(self.passed)

    def wait(self) -> tuple[int, int] | None:
        """Wait until all have ended. Returns the rank and exit code (negative for a signal) of the
        process that failed first, or None."""
        failed: tuple[int, int] | None = None
        while self._running:
            codes = {rank: process.poll() for rank, process in self._running.items()}
            # A process that ended without a message is the cause of the errors of the others.
            ended = sorted(
                (code in REPORTING, code, rank) for rank, code in codes.items() if code is not None
            )
            for _, code, rank in ended:
                del self._running[rank]
                if code and failed is None:
                    failed = rank, code
                    self._stop(None if self.passed or code in STOPPED else signal.SIGTERM)
            if time.monotonic() > self._deadline:
                self._stop(signal.SIGKILL)
            if self._running and not ended:
                time.sleep(POLL_SECONDS)
        return failed

    def _stop(self, number: int | None) -> None:
        """Send the signal ``number``, if any, to all, and limit the wait from now on."""
        self._deadline = min(self._deadline, time.monotonic() + SHUTDOWN_SECONDS)
        for process in list(self._running.values()) if number else ():
            process.send_signal(number or 0)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.passed = self.passed or number
        self._stop(number)

    def passing_signals(self) -> AbstractContextManager[None]:
        """Pass signals on to the processes while the context lasts."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
        return handling(numbers, self._pass_on)


def already_reported(text: str, rank: int) -> bool:
    """Whether another process of the run has reported the error ``text``, or the first one does so
    within FIRST_SECONDS. Always False without a store that outlives the processes.
    """
    if not has_lasting_store():
        return False
    key = f"apt/said/{hashlib.sha256(text.encode('utf-8', errors='replace')).hexdigest()}"
    try:
        store = shared_store()
        until = time.monotonic() + (FIRST_SECONDS if rank else 0.0)
        while time.monotonic() < until and not store.check([key]):
            time.sleep(POLL_SECONDS)
        return bool(store.add(key, 1) > 1)
    except (
        RuntimeError,
        ValueError,
    ):  # torch's DistError is a RuntimeError; ValueError: no number stored
        return False
