"""Jobs are done once each, whatever the number of threads."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

import pytest
import torch

from apt_plugins.moe.cpu_threads import do_all, num_workers


@dataclass(frozen=True)
class Numbered:
    name: int
    size: int = 1


@pytest.fixture(params=[1, 2, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def in_a_new_thread(call):
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def test_every_job_is_done_once_with_one_scratch_a_thread(threads):
    done, scratches = [], []
    jobs = [Numbered(i) for i in range(40)]
    do_all(jobs, lambda job, scratch: done.append((job.name, scratch)), lambda: scratches.append(0))
    assert sorted(name for name, _ in done) == list(range(40))
    assert len(scratches) == threads


def test_jobs_share_the_threads_among_them(threads):
    counts = set()
    do_all(
        [Numbered(i) for i in range(40)],
        lambda job, scratch: counts.add(torch.get_num_threads()),
        lambda: None,
    )
    assert counts == {1}
    assert torch.get_num_threads() == threads
    assert in_a_new_thread(torch.get_num_threads) == threads


def test_the_largest_come_first():
    before, order = torch.get_num_threads(), []
    torch.set_num_threads(1)
    jobs = [Numbered(i, size) for i, size in enumerate((2, 5, 3))]
    do_all(jobs, lambda job, scratch: order.append(job.name), lambda: None)
    torch.set_num_threads(before)
    assert order == [1, 2, 0]


def test_what_a_job_raises_is_raised_after_all_have_ended(threads):
    done = []

    def do(job, scratch):
        if job.name == 0:
            raise MemoryError("no room for job 0")
        time.sleep(0.002)
        done.append(job.name)

    with pytest.raises(MemoryError, match="job 0"):
        do_all([Numbered(i) for i in range(20)], do, lambda: None)
    assert len(done) == (0 if threads == 1 else 19)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_job_writes_to_tensors_of_the_callers_mode(threads, mode):
    with mode():
        out = torch.zeros(8, 3)
        weight = torch.nn.Parameter(torch.ones(3, 3))
        do_all(
            [Numbered(i) for i in range(8)],
            lambda job, scratch: torch.mm(scratch, weight, out=out[job.name : job.name + 1]),
            lambda: torch.ones(1, 3),
        )
    assert torch.equal(out, torch.full((8, 3), 3.0))


@pytest.mark.parametrize(
    ("sizes", "threads", "expected"),
    [
        ([5, 5], 2, 2),
        ([6, 5], 2, 1),
        ([60, 20, 10, 10], 4, 1),
        ([5] * 8, 16, 8),
        ([5] * 7 + [6], 8, 4),
        ([5] * 64, 6, 6),
        ([5] * 64, 1, 1),
        ([], 2, 1),
        ([0, 0], 2, 1),
    ],
)
def test_no_job_is_larger_than_a_workers_share(sizes, threads, expected):
    assert num_workers(sizes, threads) == expected


def test_a_forked_process_has_workers_of_its_own():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    jobs = [Numbered(i) for i in range(4)]
    do_all(jobs, lambda job, scratch: None, lambda: None)
    child = os.fork()
    if not child:
        done = []
        do_all(jobs, lambda job, scratch: done.append(job.name), lambda: None)
        os._exit(0 if len(done) == 4 else 1)
    torch.set_num_threads(before)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
