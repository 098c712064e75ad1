"""What a person sees of a run: one live line on a terminal, plain lines in a pipe."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from apt_core import monitor
from apt_core.monitor import ProgressDisplay, Throughput, duration, rate

ROW = {"loss": 2.3456, "lr": 1e-4, "tokens_per_s": 12_345.6}


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(monitor, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.9, "0:59"), (75.2, "1:15"), (3700, "1:01:40"), (360_000, "100:00:00")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("per_second", "text"),
    [(0, "0"), (999.4, "999"), (12_345, "12.3k"), (2_500_000, "2.5M")],
)
def test_rates(per_second: float, text: str) -> None:
    assert rate(per_second) == text


def test_in_a_pipe_there_is_a_plain_line_every_few_seconds_and_one_at_the_end(
    clock: Clock,
) -> None:
    out = StringIO()
    display = ProgressDisplay(Console(file=out), 1_000_000, 3)
    display.start(0)
    for step in (100, 200, 300):
        clock.now += 3
        display.update(step, 1, ROW)
    clock.now += 1
    display.update(1_000_000, 3, ROW)
    display.stop()
    figures = "loss 2.346  lr 1.0e-04  12.3k tok/s  left"
    assert out.getvalue() == (
        f"epoch 1/3  step 100/1000000  {figures} 8:19:57\n"
        f"epoch 1/3  step 300/1000000  {figures} 8:19:51\n"
        f"epoch 3/3  step 1000000/1000000  {figures} 0:00\n"
    )


def test_on_a_terminal_it_is_one_line_that_moves_and_goes() -> None:
    out = StringIO()
    display = ProgressDisplay(Console(file=out, force_terminal=True, width=120), 100, 3)
    display.start(0)
    display.update(50, 2, ROW)
    display.stop()
    display.stop()
    shown = out.getvalue()
    assert "epoch 2/3" in shown
    assert "50/100" in shown
    assert "loss 2.346" in shown
    assert "\x1b[2K" in shown  # the line is taken away
    assert "step 50/100" not in shown


def test_without_a_console_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    display = ProgressDisplay(None, 100, 3)
    display.start(0)
    display.update(50, 2, ROW)
    display.stop()
    assert capsys.readouterr() == ("", "")


def test_the_time_left_counts_from_where_the_run_was_resumed(clock: Clock) -> None:
    out = StringIO()
    display = ProgressDisplay(Console(file=out), 100, 3)
    display.start(60)
    clock.now += 40
    display.update(80, 2, ROW)
    assert out.getvalue().endswith("left 0:40\n")


def test_before_the_first_step_no_time_is_foretold(clock: Clock) -> None:
    out = StringIO()
    display = ProgressDisplay(Console(file=out), 100, 3)
    display.start(60)
    display.update(60, 2, ROW)
    assert out.getvalue().endswith("left 0:00\n")


def test_throughput_is_since_the_last_reading(clock: Clock) -> None:
    throughput = Throughput()
    throughput.add(100)
    clock.now += 2
    assert throughput.read() == 50
    throughput.add(30)
    clock.now += 1
    assert throughput.read() == 30
    assert throughput.read() == 0


def test_evaluation_and_saving_are_no_training_time(clock: Clock) -> None:
    throughput = Throughput()
    throughput.add(100)
    clock.now += 1
    for _ in range(2):
        throughput.pause()
        clock.now += 60
        throughput.resume()
    clock.now += 1
    assert throughput.read() == 50


def test_a_reading_within_a_pause_stops_at_its_beginning(clock: Clock) -> None:
    throughput = Throughput()
    throughput.add(100)
    clock.now += 2
    throughput.pause()
    clock.now += 60
    assert throughput.read() == 50
    clock.now += 60
    throughput.resume()
    throughput.add(10)
    clock.now += 1
    assert throughput.read() == 10
