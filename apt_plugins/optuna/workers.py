"""Starts the worker processes of a study on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from apt_core.cli.output import complain
from apt_core.parallel.child_process import command_of
from apt_core.parallel.signals import handling

WORKER = "APT_TUNE_WORKER"
"""The number of a worker process, in its environment."""

POLL_SECONDS = 0.25
SHUTDOWN_SECONDS = 600.0
"""Seconds that stopping workers may take to save before they are killed."""

MAX_RESTARTS = 10
"""How many workers that were killed are replaced: the system kills what takes too much memory."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def thread_share(workers: int) -> int | None:
    """The CPU threads of each of ``workers`` trials at once; None for one, which torch chooses."""
    return max(1, (os.cpu_count() or 1) // workers) if workers > 1 else None


def environments(workers: int, device: str) -> list[dict[str, str]]:
    """What the environment of each worker has beside this one's: its share of the CPU threads, and
    its GPU, where the profile's ``device`` may be one and there are several."""
    threads = {"OMP_NUM_THREADS": str(thread_share(workers) or 1)}
    found = [threads | {} for _ in range(workers)]
    if device in ("auto", "cuda"):
        import torch

        named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = named.split(",") if named else [*map(str, range(torch.cuda.device_count()))]
        for index, each in enumerate(found if gpus else ()):
            each["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
    return found


def run_workers(
    arguments: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    tick: Callable[[], None],
) -> int:
    """Run ``apt-tune ARGUMENTS`` in a process for each of the environments, and call ``tick`` now
    and then. Returns 0, the exit code of the signal that stopped them, or that of a worker which
    failed.

    Signals are passed on. A worker that was killed is replaced.
    """
    command = command_of("apt_plugins.optuna.command", "apt-tune", arguments)
    running: dict[int, subprocess.Popen[bytes]] = {}
    passed, code, restarts, deadline = 0, 0, 0, float("inf")

    def start(index: int) -> None:
        environment = {**os.environ, **environments[index], WORKER: str(index + 1)}
        # In its own session: Ctrl-C at a terminal reaches it through this process only.
        running[index] = subprocess.Popen(command, env=environment, start_new_session=True)

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal passed, deadline
        passed = passed or number
        deadline = min(deadline, time.monotonic() + SHUTDOWN_SECONDS)
        for process in list(running.values()):
            process.send_signal(number)

    with handling(SIGNALS, pass_on):
        try:
            for index in range(len(environments)):
                if not passed:
                    start(index)
            while running:
                for index, process in list(running.items()):
                    ended = process.poll()
                    if ended is None:
                        if time.monotonic() > deadline:
                            process.kill()
                        continue
                    del running[index]
                    if ended < 0 and not passed and restarts < MAX_RESTARTS:
                        restarts += 1
                        complain(
                            f"worker {index + 1} was killed by signal {-ended}, as the system does "
                            "for want of memory: another one takes its place"
                        )
                        start(index)
                    elif ended and not passed:
                        code = code or (ended if ended > 0 else 1)
                tick()
                time.sleep(POLL_SECONDS)
        finally:
            for process in running.values():
                process.kill()
    return 128 + passed if passed else code
