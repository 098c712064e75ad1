"""Which processes are taken for gone: with a clock of our own, and processes that do what is asked.

The thread is not started: the test takes its looks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from apt_core.errors import ProcessLostError
from apt_core.parallel import liveness
from apt_core.parallel.liveness import LOOK_SECONDS, SILENT_SECONDS, Liveness, _Watch

COMPUTES = "print(flush=True)\nwhile True: pass"
WAITS = "print(flush=True)\nimport time\ntime.sleep(600)"


@pytest.fixture
def now(monkeypatch):
    """The time, which passes where the test says so."""
    clock = SimpleNamespace(value=1000.0)
    monkeypatch.setattr(liveness, "time", SimpleNamespace(monotonic=lambda: clock.value))
    return clock


@pytest.fixture
def start() -> Iterator[object]:
    started = []

    def process(code: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
        started[-1].stdout.readline()
        return started[-1]

    yield process
    for each in started:
        each.kill()
        each.communicate()


@pytest.fixture
def watch(now, tmp_path, monkeypatch):
    """The watch of the first of two processes; the other one is at a pid, or elsewhere."""
    monkeypatch.setattr(liveness, "end_collectives", lambda: None)
    place = SimpleNamespace(there=True)

    def connect() -> dist.Store:
        if not place.there:
            raise RuntimeError("nobody answers")
        return dist.FileStore(str(tmp_path / "store"), -1)

    def make(pid: int | None, rank: int = 0) -> _Watch:
        pids = [os.getpid(), pid]
        made = _Watch(Liveness(), connect, "run", rank, pids if rank == 0 else pids[::-1])
        made.place = place
        made._thread = SimpleNamespace(start=lambda: None)
        made.start()
        return made

    return make


def looks(watch: _Watch, now: SimpleNamespace, seconds: float = 0.0) -> str:
    """What the watch sees while ``seconds`` pass."""
    until = now.value + seconds
    while not (how := watch._check()) and now.value < until:
        now.value += LOOK_SECONDS
    return how


def ends(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def test_a_process_that_was_killed_is_seen_at_once_and_one_that_has_ended_well_is_not(
    watch, now, start
):
    well, killed = start(WAITS), start(WAITS)
    one, other = watch(well.pid), watch(killed.pid)
    assert not looks(one, now) and not looks(other, now)
    one._write("1 ended", "")
    ends(well)
    assert not looks(one, now, 2 * SILENT_SECONDS)
    other._run = "apt/alive/another run"  # in which nobody has said anything
    ends(killed)
    assert looks(other, now) == "process 1 has ended"


def test_a_process_that_is_stopped_is_killed_and_one_that_computes_is_alive(watch, now, start):
    computing, stopped = start(COMPUTES), start(WAITS)
    stopped.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
    alive, silent = watch(computing.pid), watch(stopped.pid)

    def has_computed() -> None:
        before = alive._cpu_time(1)
        while alive._cpu_time(1) == before:
            pass

    for _ in range(4):
        assert not looks(alive, now, SILENT_SECONDS / 2)
        has_computed()
    assert not looks(silent, now, SILENT_SECONDS - 2)
    assert f"process 1 has not answered for {SILENT_SECONDS:.0f} s" in looks(silent, now, 4)
    assert stopped.wait() == -signal.SIGKILL


def test_of_a_process_on_another_machine_there_are_signs_of_life(watch, now):
    first, second = watch(None), watch(None, rank=1)
    for _ in range(int(2 * SILENT_SECONDS)):
        assert not second._check() and not first._check()
        now.value += LOOK_SECONDS
    # What one finds out the others hear of.
    how = looks(first, now, SILENT_SECONDS + LOOK_SECONDS)
    assert how == f"process 1 has not answered for {SILENT_SECONDS:.0f} s"
    first._write("lost", how)
    assert second._check() == how


def test_time_in_which_this_process_stood_still_or_the_store_was_gone_says_nothing(watch, now):
    alone = watch(None)
    assert not looks(alone, now, SILENT_SECONDS - 10)
    now.value += 10 * SILENT_SECONDS
    assert not looks(alone, now, SILENT_SECONDS - 10)
    alone.place.there, alone._store = False, None
    assert not looks(alone, now, 3 * SILENT_SECONDS)
    alone.place.there = True
    assert not looks(alone, now, SILENT_SECONDS - 10)
    assert "has not answered" in looks(alone, now, 20)


def test_without_the_store_the_end_of_a_process_may_be_that_of_the_run_for_a_moment(
    watch, now, start
):
    process = start(WAITS)
    alone = watch(process.pid)
    assert not looks(alone, now)
    alone.place.there, alone._store = False, None
    ends(process)
    assert not looks(alone, now, liveness.SLACK_SECONDS)
    assert looks(alone, now, 2 * LOOK_SECONDS) == "process 1 has ended"


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_that_fails_is_lost_for_the_others_and_one_that_ends_is_not(
    monkeypatch, tmp_path, fails
):
    """The thread itself, of one process and then of the other."""
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.01)
    given_up = []
    monkeypatch.setattr(liveness, "end_collectives", lambda: given_up.append(1))
    ranks = [Liveness(), Liveness()]

    def watching(rank: int):
        store = str(tmp_path / "store")
        return ranks[rank].watching(lambda: dist.FileStore(store, -1), "run", rank, [None, None])

    with watching(0):
        ranks[0].require_others()
        try:
            with watching(1):
                if fails:
                    raise ValueError("one of them")
        except ValueError:
            assert given_up  # nobody is to wait for what it has begun
        if not fails:
            dist.FileStore(str(tmp_path / "store"), -1).get("apt/alive/run/1 ended")
            ranks[0].require_others()
            return
        while not ranks[0].lost:
            pass
        with pytest.raises(ProcessLostError, match=r"process 1 has failed"):
            ranks[0].require_others()


def test_what_gpus_have_under_way_is_ended_and_groups_of_the_cpu_are_left_alone(monkeypatch):
    done = []

    class Group:
        def __init__(self, name: str, kinds: list[str]) -> None:
            self.name, self._device_types = name, [torch.device(kind) for kind in kinds]

        def _get_backend(self, device: torch.device) -> Group:
            return self

        def _group_start(self) -> None:
            done.append("start")

        def _group_end(self) -> None:
            done.append("end")

        def abort(self) -> None:
            done.append(self.name)

    made = [Group("0", ["cpu", "cuda"]), Group("1", ["cpu"]), Group("2", ["cuda"])]
    world = SimpleNamespace(pg_names={group: group.name for group in made})
    monkeypatch.setattr(liveness, "distributed_c10d", SimpleNamespace(_world=world))
    Liveness().give_up()
    assert done == ["start", "2", "0", "end"]
    done.clear()
    world.pg_names = {made[1]: "1"}
    Liveness().give_up()
    assert done == []
