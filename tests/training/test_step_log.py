"""What a run records: every key of a row, the line of progress, the trace, the summary."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console

from apt_core import hookimpl
from apt_core.cli.hooks import app as hooks_app
from apt_core.cli.run_command import run_command
from apt_core.errors import TrainingError
from apt_core.metric_names import OWN_GROUPS
from apt_core.monitor import ProgressDisplay
from apt_core.parallel.peak import measured_peak_flops
from apt_core.testing import tiny_run
from apt_core.training.step.clock import PARTS

OFTEN = {"training.log_every_steps": 1}


def of_steps(run: Any) -> list[dict[str, Any]]:
    return [row for row in run.metrics if "loss" in row]


def of_evaluations(run: Any) -> list[dict[str, Any]]:
    return [row for row in run.metrics if "val_loss" in row]


# Speed


def test_a_row_has_the_speed_the_memory_and_the_split_of_the_time():
    for row in of_steps(tiny_run(steps=4)):
        assert row["tokens_per_s"] > 0 and row["mfu"] > 0
        assert 50 < row["memory_mb"] < 64 * 1024
        assert all(row[f"time/{part}_ms"] >= 0 for part in PARTS)
        assert row["time/forward_backward_ms"] > 0


def test_the_parts_are_the_step():
    """They are no more than what passed between the rows, and most of it."""

    class Watch:
        def __init__(self) -> None:
            self.seconds: dict[int, float] = {}

        @hookimpl(priority=0)
        def on_step_start(self, step: int) -> None:
            self.started = time.perf_counter()

        @hookimpl(priority=100)
        def on_step_end(self, step: int) -> None:
            self.seconds[step] = time.perf_counter() - self.started

    watch = Watch()
    run = tiny_run(watch, steps=6, overrides=OFTEN)
    for row in of_steps(run):
        parts = sum(row[f"time/{part}_ms"] for part in PARTS) - row["time/data_ms"]
        # Nearly all that the loop does lies between the two hooks.
        assert parts >= 1e3 * watch.seconds[row["step"]] * 0.99 - 0.01


def test_mfu_is_the_arithmetic_of_the_model_over_the_measured_peak():
    """By a count of its own: 6 FLOPs for each weight of a matrix, 12 T d for the scores of a
    layer."""
    width, hidden, layers, length = 64, 128, 2, 32
    run = tiny_run(
        steps=4,
        overrides={
            "model.d_model": width, "model.d_ff": hidden, "model.num_layers": layers,
            "model.max_seq_len": length, "model.attention_name": "mha",
            "evaluation.sample_tokens": 0,
        },
    )  # fmt: skip
    blocks = [p for name, p in run.weights.items() if p.ndim == 2 and "blocks" in name]
    weights = sum(p.numel() for p in blocks) + 256 * width  # the tied output
    flops = 6 * weights + 12 * layers * length * width
    peak = measured_peak_flops(torch.device("cpu"), torch.float32)
    for row in of_steps(run):
        assert row["mfu"] == pytest.approx(flops * row["tokens_per_s"] / peak, rel=0.01)


def test_a_model_that_computes_most_of_the_time_uses_much_of_the_peak():
    run = tiny_run(
        steps=2,
        overrides={
            "model.d_model": 256, "model.d_ff": 1024, "model.num_layers": 2, "model.num_heads": 4,
            "model.max_seq_len": 64, "training.batch_size": 8, "evaluation.sample_tokens": 0,
            "evaluation.eval_freq": 0, "hardware.num_threads": 1, "training.log_every_steps": 1,
        },
    )  # fmt: skip
    # It is left out where other programs have disturbed the measurement of the peak.
    assert 0.02 < of_steps(run)[-1].get("mfu", 1.0) <= 1


def test_what_comes_before_the_first_step_is_no_training_time():
    class Slow:
        @hookimpl
        def on_training_start(self) -> None:
            time.sleep(0.1)
            self.ready = time.perf_counter()

        @hookimpl
        def on_metrics(self, step: int) -> None:
            if step == 1:
                self.told = time.perf_counter()

    slow = Slow()
    first = of_steps(tiny_run(slow, steps=1, overrides=OFTEN))[0]
    assert first["tokens"] / first["tokens_per_s"] <= slow.told - slow.ready


# Hooks


class Sleepy:
    """Takes 5 ms of every step."""

    @hookimpl
    def on_step_end(self) -> None:
        time.sleep(0.005)


class Quick:
    """Takes none of a step, and much of what comes after one."""

    @hookimpl
    def on_step_end(self) -> None:
        pass

    @hookimpl
    def on_metrics(self) -> None:
        time.sleep(0.03)

    @hookimpl
    def on_evaluation_end(self) -> None:
        time.sleep(0.03)


@pytest.mark.parametrize("every", [1, 3])
def test_the_time_of_a_hook_is_its_plugins_alone(every):
    run = tiny_run(
        Sleepy(),
        Quick(),
        steps=6,
        overrides={"training.log_every_steps": every, "evaluation.eval_freq": 1},
    )
    rows = of_steps(run)
    assert len(rows) == 6 / every
    for row in rows:
        assert row["time/hooks/sleepy_ms"] >= 5
        assert row["time/hooks_ms"] >= 5
        # Were the 60 ms that are not of a step its own, it would lead.
        assert row["time/hooks/quick_ms"] < row["time/hooks/sleepy_ms"]


class Terms:
    """Takes 4 ms of every forward."""

    @hookimpl
    def apt_loss_terms(self, output: Any) -> dict[str, Any]:
        time.sleep(0.004)
        return {"small": 0.25 * output.logits.square().mean()}


class Around:
    """Takes 6 ms before and after what the others do, every third time 4 more."""

    @hookimpl(wrapper=True)
    def on_backward_end(self, step: int) -> Any:
        time.sleep(0.003)
        yield
        time.sleep(0.003 + 0.004 * (step % 3 == 1))

    @hookimpl
    def on_plugin_enabled(self) -> None:
        time.sleep(0.03)


class Metrics(Quick):
    @hookimpl
    def apt_metrics(self) -> dict[str, float]:
        time.sleep(0.03)
        return {"x": 1.0}


@pytest.mark.parametrize("every", [1, 3])
def test_the_times_of_plugins_are_parts_of_their_part_of_the_step(every):
    run = tiny_run(
        Sleepy(),
        Terms(),
        Around(),
        Metrics(),
        steps=6,
        overrides={
            "training.log_every_steps": every,
            "evaluation.eval_freq": 1,
            "schedules.enable_metrics_at_step": 2,
        },
    )
    for row in of_steps(run):
        hooks = {k: v for k, v in row.items() if k.startswith("time/hooks/")}
        assert set(hooks) <= {f"time/hooks/{name}_ms" for name in ("sleepy", "around", "metrics")}
        # Each figure is rounded.
        assert sum(hooks.values()) <= row["time/hooks_ms"] + 0.002
        assert hooks["time/hooks/sleepy_ms"] >= 5
        # Also what comes in steps without a row: the whole and its parts are means of the same.
        assert hooks["time/hooks/around_ms"] >= 6 + (every == 3) * 4 / 3
        assert 4 <= row["time/loss_terms/terms_ms"] <= row["time/forward_backward_ms"] + 0.002


class Failing:
    """Fails until it is not called any more."""

    def __init__(self) -> None:
        self.calls = 0

    @hookimpl
    def on_step_end(self) -> None:
        self.calls += 1
        raise ValueError("boom")


@pytest.mark.parametrize("every", [1, 2, 4])
def test_a_plugin_in_quarantine_is_called_from_no_plan_that_was_kept(every):
    failing = Failing()
    overrides = {"training.log_every_steps": every}
    run = tiny_run(failing, Sleepy(), steps=12, strict=False, overrides=overrides)
    assert run.manager.records["failing"].state == "quarantined"
    assert failing.calls == len(run.manager.records["failing"].failures) == 3
    last = of_steps(run)[-1]
    assert "time/hooks/failing_ms" not in last
    assert last["time/hooks/sleepy_ms"] >= 5


TRACED = """
import time
from apt_core import hookimpl

@hookimpl
def on_step_end(step):
    time.sleep(0.005)
    if {fails}:
        raise ValueError("boom")
"""


@pytest.mark.parametrize("every", [1, 3])
def test_the_trace_and_the_rows_time_the_same_calls(profile, tmp_path, capsys, every):
    """Every call, although rows time those of a step in so many."""
    for name, fails in (("slow", False), ("failing", True)):
        (tmp_path / f"{name}.py").write_text(TRACED.format(fails=fails))
    plugins = ",".join(str(tmp_path / f"{name}.py") for name in ("slow", "failing"))
    code = run_command(
        hooks_app,
        "apt-hooks",
        ["trace", "--", "-p", str(profile), "--plugin", plugins, "--output",
         str(tmp_path / "run"), "--training.max_steps", "6",
         f"--training.log_every_steps={every}"],
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0, printed
    table = {tuple(line.split()[:2]): line.split()[2:] for line in printed.splitlines()}
    calls, total, mean, longest = map(float, table["on_step_end", "slow"])
    assert calls == 6 and total >= 30 and mean >= 5000 and longest >= 5000
    assert table["on_step_end", "failing"][0] == "3"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    assert all(row["time/hooks/slow_ms"] >= 5 for row in rows)
    assert "time/hooks/failing_ms" not in rows[-1]


# The loss and its parts


def test_the_cross_entropy_is_logged_apart_from_the_terms_of_plugins(tmp_path):
    """In every row, to the bit as without terms; also in steps of several micro-batches, in the
    short step that ends an epoch, and before a plugin is enabled."""
    out = StringIO()
    overrides = {
        "training.log_every_steps": 1,
        "training.grad_accum_steps": 3,
        "training.batch_size": 3,
        "training.learning_rate": 1e-30,
    }
    run = tiny_run(
        Terms(),
        overrides={**overrides, "schedules.enable_terms_at_step": 3},
        output=tmp_path / "run",
        console=Console(file=out, width=200),
    )
    plain = of_steps(tiny_run(overrides=overrides))
    rows = of_steps(run)
    assert [row["loss/cross_entropy"] for row in rows] == [row["loss"] for row in plain]
    assert all(row["loss/cross_entropy"] == row["loss"] for row in plain)
    for row in rows:
        assert ("loss/terms.small" in row) == (row["step"] >= 3)
        parts = [value for name, value in row.items() if name.startswith("loss/")]
        assert row["loss"] == pytest.approx(sum(parts), rel=1e-6)
    last = rows[-1]
    assert last["loss"] > last["loss/cross_entropy"]
    shown = f"loss {last['loss/cross_entropy']:.3f} ({last['loss']:.3f} with terms)"
    assert shown in out.getvalue()
    said = (tmp_path / "run" / "log.txt").read_text()
    assert f"Epoch 2/2: loss={last['loss/cross_entropy']:.3f}  held out" in said


def test_a_term_is_not_blamed_where_the_cross_entropy_is_not_finite_either():
    class Spoils:
        @hookimpl
        def on_step_start(self, trainer: Any) -> None:
            with torch.no_grad():
                trainer.model.embedding.weight.fill_(float("nan"))

    overrides = {"training.log_every_steps": 1, "training.max_nonfinite_steps": 2}
    with pytest.raises(TrainingError) as caught:
        tiny_run(Spoils(), Terms(), overrides=overrides)
    assert "loss/terms.small" not in str(caught.value)


CORES = ("data_ms", "cross_entropy", "pull", "weights_mb", "time/x")


def test_no_plugin_writes_where_the_core_does():
    class Imitates:
        @hookimpl
        def apt_metrics(self) -> dict[str, float]:
            return dict.fromkeys(CORES, -7.0)

    plugins = [type(group, (Imitates,), {})() for group in sorted(OWN_GROUPS)]
    run = tiny_run(*plugins, overrides={"training.log_every_steps": 1}, steps=1)
    row = next(row for row in run.metrics if "loss" in row)
    written = [name for name, value in row.items() if value == -7.0]
    expected = [f"plugin/{group}/{name}" for group in OWN_GROUPS for name in CORES]
    assert sorted(written) == sorted(expected)


# Evaluations


def test_an_evaluation_says_how_many_targets_it_looked_at():
    class Validation:
        @hookimpl
        def on_training_start(self, trainer: Any) -> None:
            self.targets = trainer.parts.data.sources[0].store.part("val").num_tokens - 1

    whole = Validation()
    run = tiny_run(whole, steps=6, overrides={"evaluation.eval_batches": 1})
    limited, final = of_evaluations(run)[-2:]
    # One batch of 4 sequences of 16, of what is more than that.
    assert limited["val_tokens"] == 64 < final["val_tokens"] == whole.targets


# The display and the end


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The last line that is printed after 30 s, in which half of the steps were taken."""
    clock = Clock()
    monkeypatch.setattr("apt_core.monitor.time", clock)

    def show(total: int = 100, max_seconds: float | None = None, **row: Any) -> str:
        out = StringIO()
        display = ProgressDisplay(Console(file=out), total, 3, max_seconds)
        clock.now = 0.0
        display.start(0)
        clock.now = 30.0
        figures = {"loss": 2.0, "lr": 1e-3, "tokens_per_s": 1000.0, **row}
        display.update(50, 2, figures)
        return out.getvalue().splitlines()[-1]

    return show


def test_a_line_shows_how_well_the_device_is_used_and_what_was_skipped(shown):
    assert shown(mfu=0.314).endswith("1.0k tok/s  mfu 31%  left 0:30")
    assert shown(mfu=0.314, skipped_steps=2).endswith("mfu 31%  skipped 2  left 0:30")
    assert "mfu" not in shown()


def test_the_time_left_ends_where_a_limit_does(shown):
    assert shown(max_seconds=40.0).endswith("left 0:10")
    assert shown(max_seconds=4000.0).endswith("left 0:30")
    assert shown(max_seconds=20.0).endswith("left 0:00")


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--training.max_tokens", "256"], 4),
        (["--training.max_steps", "5"], 5),
        (["--stop-at-step", "3"], 3),
        (["--training.max_steps", "5", "--stop-at-step", "7"], 5),
    ],
)
def test_the_progress_counts_to_the_step_that_the_run_ends_with(apt_train, options, steps):
    run = apt_train(*options, "--training.log_every_steps", "1")
    assert run.manifest["step"] == steps
    assert f"step {steps}/{steps}  loss" in run.out
    assert run.out.partition(f"step {steps}/{steps}")[2].splitlines()[0].endswith("left 0:00")


def test_the_end_says_how_fast_it_was_and_what_it_took(apt_train):
    run = apt_train("--training.max_steps", "4")
    figures = run.manifest["figures"]
    assert figures["tokens_per_s"] > 0 and figures["memory_mb"] > 50
    (line,) = (line for line in run.out.splitlines() if line.startswith("finished: "))
    assert line.startswith("finished: 4 steps, 256 tokens in 0:")
    assert " tok/s, " in line and line.endswith(" MB at the most")
    assert "skipped" not in run.out and "could not be written" not in run.out


def test_the_speed_at_the_end_is_of_the_steps_of_this_part_alone(tmp_path):
    """Without evaluations."""

    class Slow:
        @hookimpl
        def on_training_start(self) -> None:
            self.evaluations, self.started = 0, time.perf_counter()

        @hookimpl
        def on_evaluation_start(self) -> None:
            self.evaluations += 1
            time.sleep(0.1)

        @hookimpl
        def on_training_end(self) -> None:
            self.seconds = time.perf_counter() - self.started

    slow = Slow()
    options = {"output": tmp_path / "run", "overrides": {"evaluation.eval_freq": 1}}
    tiny_run(slow, stop_at_step=4, **options)
    figures = tiny_run(slow, resume=True, stop_at_step=6, **options).result.figures
    assert figures["tokens"] == 6 * 64 and slow.evaluations >= 2
    assert 2 * 64 / figures["tokens_per_s"] <= slow.seconds - 0.1 * slow.evaluations


def test_memory_is_told_by_part_where_the_profile_asks() -> None:
    """Parameters and their gradients are as large, Adam keeps two of them, an average one."""
    overrides = {"debug.profile_memory": True, "training.ema_decay": 0.5}
    (row,) = (row for row in tiny_run(steps=2, overrides=overrides).metrics if "lr" in row)
    parts = {name: row[f"memory/{name}_mb"] for name in ("gradients", "optimizer", "averages")}
    size = row["memory/weights_mb"]
    assert 0 < size < row["memory_mb"]
    expected = {"gradients": size, "optimizer": 2 * size, "averages": size}
    assert parts == pytest.approx(expected, rel=0.3)
    assert not any(name.startswith("memory/") for row in tiny_run(steps=2).metrics for name in row)
