"""Where the time of a step goes: what was between two laps, as milliseconds of a step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from apt_core import monitor
from apt_core.parallel.world import World
from apt_core.runs.run_state import Progress
from apt_core.training.step import clock as step_clock
from apt_core.training.step import usage
from apt_core.training.step.clock import PARTS, StepClock
from apt_core.training.step.usage import Usage


class Time:
    """Stands still until it is moved."""

    now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(step_clock, "perf_counter", time)
    return time


def test_what_a_gpu_has_still_to_do_when_something_else_comes_is_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = Time()
    monkeypatch.setattr(monitor, "time", SimpleNamespace(perf_counter=now))
    device = torch.device("cuda:1")
    used = Usage(device, None, World(), Progress(), None)

    def synchronize(of: torch.device) -> None:
        assert of == device
        now.now += 6

    monkeypatch.setattr(usage, "synchronize", synchronize)
    used.throughput.add(100)
    now.now += 2  # a step is given to the device; what it takes comes behind
    used.pause()
    now.now += 1000  # an evaluation
    used.throughput.resume()
    now.now += 2
    assert used.throughput.read() == 100 / (2 + 6 + 2)


def step(clock: StepClock, time: Time, scale: float = 1.0, *, sampling: bool = False) -> None:
    clock.start(sampling=sampling)
    for part, seconds in (
        ("data", 1), ("hooks", 2), ("forward_backward", 4), ("hooks", 8), ("optimizer", 16),
    ):  # fmt: skip
        time.now += scale * seconds
        clock.lap(part)


def test_a_part_is_the_sum_of_its_stretches_and_all_of_them_are_the_step(time: Time) -> None:
    clock = StepClock(torch.device("cpu"))
    step(clock, time)
    read = clock.read()
    assert read == {"data": 1000, "forward_backward": 4000, "optimizer": 16000, "hooks": 10000}
    assert sum(read.values()) == 31_000
    assert tuple(read) == PARTS


def test_on_a_cpu_it_is_the_mean_of_the_steps_since_the_last_reading(time: Time) -> None:
    clock = StepClock(torch.device("cpu"))
    step(clock, time)
    time.now += 1000  # an evaluation between two steps is no part of either
    step(clock, time, 3)
    assert clock.read()["forward_backward"] == pytest.approx((4 + 12) / 2 * 1000)
    step(clock, time)
    assert clock.read()["forward_backward"] == pytest.approx(4000)
    assert set(clock.read().values()) == {0}


def test_on_a_gpu_the_sampled_step_counts_alone_and_nothing_waits_before_it_is_read(
    time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "the stream of cuda:1"
            self.at = time.now

        def elapsed_time(self, later: Event) -> float:
            assert waited
            return 1e3 * (later.at - self.at)

    cuda = SimpleNamespace(
        Event=Event, synchronize=waited.append, current_stream=lambda of: f"the stream of {of}"
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    clock = StepClock(torch.device("cuda:1"))
    step(clock, time)
    step(clock, time, 2, sampling=True)
    step(clock, time)
    assert not waited
    read = clock.read()
    assert waited == [clock.device]
    assert read == {"data": 2000, "forward_backward": 8000, "optimizer": 32000, "hooks": 20000}
    assert set(clock.read().values()) == {0}
