"""Runs independent jobs of many operations on threads, each job on one thread.

torch divides each operation among its threads, which then wait for one another. With one thread per
job a thread that is done takes the next job, and a job's intermediate results stay in the cache of
its core.
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
    """Call ``do(job, scratch)`` for all jobs, the largest first, with one ``make_scratch()`` per
    thread.

    The order and threads of jobs vary, so ``do`` must not write anything that another job reads or
    writes. It records no gradients. Its error is raised here, after all threads have ended.
    """
    waiting = iter(sorted(jobs, key=lambda job: -job.size))
    number = num_workers([job.size for job in jobs], torch.get_num_threads())
    if number == 1:
        _take(waiting, do, make_scratch())
        return
    pool = _pool(number, torch.get_num_threads(), os.getpid())
    # Allocated by the calling thread: memory freed by others returns to the system more often.
    scratches = [make_scratch() for _ in range(number)]
    futures = [pool.submit(_take, waiting, do, scratch) for scratch in scratches]
    wait(futures)
    for future in futures:
        future.result()


def num_workers(sizes: Sequence[int], threads: int) -> int:
    """The number of workers, each with an equal part of torch's ``threads``: as many as possible
    without a job larger than a worker's share of all."""
    largest, total = max(sizes, default=0), sum(sizes)
    divisors = (n for n in range(threads, 1, -1) if threads % n == 0)
    return next((n for n in divisors if 0 < n * largest <= total), 1)


def _take(
    waiting: Iterator[AnyJob], do: Callable[[AnyJob, Scratch], None], scratch: Scratch
) -> None:
    # Modes belong to a thread. Inference mode can write to tensors of any mode of the caller.
    with torch.inference_mode():
        for job in waiting:
            do(job, scratch)


@lru_cache(maxsize=1)
def _pool(number: int, threads: int, pid: int) -> ThreadPoolExecutor:
    """A pool of threads, made anew in a forked process ``pid``, which has no threads of its
    parent."""
    ready = Barrier(number + 1)

    def start() -> None:
        # torch overwrites a setting that is made before the first query.
        torch.get_num_threads()
        torch.set_num_threads(threads // number)
        ready.wait()

    pool = ThreadPoolExecutor(number, "apt-moe", start)
    for _ in range(number):
        pool.submit(int)
    ready.wait()
    # Setting it in a thread has also set it for later threads.
    torch.set_num_threads(threads)
    return pool
