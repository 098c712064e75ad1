"""Jobs of many operations, each done by one thread from its beginning to its end.

torch shares out each operation among its threads, which then wait for one another. Where jobs need
nothing of each other a thread that is ahead can take the next one, and what a job has computed is
still in the caches of its processor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from threading import Barrier
from typing import Protocol, TypeVar

import torch


class Job(Protocol):
    @property
    def size(self) -> int: ...


AnyJob = TypeVar("AnyJob", bound=Job)
Scratch = TypeVar("Scratch")


def do_all(
    jobs: Sequence[AnyJob],
    do: Callable[[AnyJob, Scratch], None],
    make_scratch: Callable[[], Scratch],
) -> None:
    """``do(job, scratch)`` for all, the largest first, with one ``make_scratch()`` a thread.

    The jobs' order and threads vary, so ``do`` writes nothing that another job reads or writes. It
    records no gradients. What it raises is raised here, after all threads have ended.
    """
    waiting = iter(sorted(jobs, key=lambda job: -job.size))
    number = num_workers([job.size for job in jobs], torch.get_num_threads())
    if number == 1:
        _take(waiting, do, make_scratch())
        return
    pool = _pool(number, torch.get_num_threads(), os.getpid())
    # Memory of the calling thread, since what others free goes back to the system more often.
    scratches = [make_scratch() for _ in range(number)]
    futures = [pool.submit(_take, waiting, do, scratch) for scratch in scratches]
    wait(futures)
    for future in futures:
        future.result()


def num_workers(sizes: Sequence[int], threads: int) -> int:
    """How many jobs are done at a time, each with an equal part of torch's ``threads``: as many as
    leave no job larger than a worker's share of all."""
    largest, total = max(sizes, default=0), sum(sizes)
    divisors = (n for n in range(threads, 1, -1) if threads % n == 0)
    return next((n for n in divisors if 0 < n * largest <= total), 1)


def _take(
    waiting: Iterator[AnyJob], do: Callable[[AnyJob, Scratch], None], scratch: Scratch
) -> None:
    # Modes are a thread's own. This one lets it write to tensors of whatever mode the caller has.
    with torch.inference_mode():
        for job in waiting:
            do(job, scratch)


@lru_cache(maxsize=1)
def _pool(number: int, threads: int, pid: int) -> ThreadPoolExecutor:
    """Made anew in a forked process, ``pid``, which has no threads of its parent."""
    ready = Barrier(number + 1)

    def start() -> None:
        # What is set before torch has asked for it once is overwritten.
        torch.get_num_threads()
        torch.set_num_threads(threads // number)
        ready.wait()

    pool = ThreadPoolExecutor(number, "apt-moe", start)
    for _ in range(number):
        pool.submit(int)
    ready.wait()
    # Setting it in a thread has set it for threads to come.
    torch.set_num_threads(threads)
    return pool
