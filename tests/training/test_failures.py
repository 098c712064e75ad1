"""What goes wrong in a run costs what it must and no more: steps that are not finite, memory, the
disk, signals."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apt_core import hookimpl
from apt_core.data.batches import Batch
from apt_core.errors import DivergedError, PluginError
from apt_core.modeling.compose import ModelBuilder
from apt_core.optim.averages import WeightAverage
from apt_core.runs import checkpoint
from apt_core.testing import tiny_run
from apt_core.testing.tiny import TEXT
from apt_core.training.step.finite_guard import FiniteGuard

NAN, INF = float("nan"), float("inf")


# Steps that are not finite


class Watcher:
    """Compares everything that a step may move with what it was before the update."""

    def __init__(self) -> None:
        self.moved: list[int] = []

    @hookimpl
    def on_backward_end(self, trainer: Any) -> None:
        self.before = self._state(trainer)

    @hookimpl
    def on_step_end(self, step: int, trainer: Any) -> None:
        after = self._state(trainer)
        if any(not torch.equal(after[name], kept) for name, kept in self.before.items()):
            self.moved.append(step)

    @staticmethod
    def _state(trainer: Any) -> dict[str, torch.Tensor]:
        model = {f"model {n}": p.detach().clone() for n, p in trainer.model.named_parameters()}
        moments = {
            f"{name} {index}": tensor.clone()
            for index, state in enumerate(trainer.optimizer.state.values())
            for name, tensor in state.items()
        }
        average = {
            f"average {n}": value.clone()
            for n, value in trainer.trained.averages.ema.values.items()
        }
        return {**model, **moments, **average}


class BadTerm:
    """A loss term that is ``value`` at some steps."""

    def __init__(self, steps: set[int], value: float = NAN) -> None:
        self.steps, self.value = steps, value

    @hookimpl
    def apt_loss_terms(self, trainer: Any, output: Any) -> dict[str, torch.Tensor]:
        bad = trainer.step + 1 in self.steps
        return {"term": output.logits.mean() * (self.value if bad else 0.0)}


class BadGradient:
    """An entry of one gradient is ``value`` at some steps."""

    def __init__(self, steps: set[int], value: float = NAN) -> None:
        self.steps, self.value = steps, value

    @hookimpl
    def on_backward_end(self, step: int, trainer: Any) -> None:
        if step in self.steps:
            next(trainer.model.parameters()).grad[0, 0] = self.value


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", [BadTerm, BadGradient])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_step_that_is_not_finite_moves_nothing_and_is_told(tmp_path, optimizer, kind, value):
    watcher = Watcher()
    run = tiny_run(
        watcher,
        kind({3, 4}, value),
        steps=6,
        output=tmp_path / "run",
        overrides={"training.ema_decay": 0.5, "training.optimizer_name": optimizer},
    )
    assert watcher.moved == [1, 2, 5, 6]
    skipped = [row.get("skipped_steps") for row in run.metrics if "loss" in row]
    assert skipped == [None, 2, 2]
    assert run.manifest["figures"]["skipped_steps"] == 2
    said = (tmp_path / "run" / "log.txt").read_text()
    assert "not finite, and changed nothing: step 3, 4 (2 in all)" in said
    assert ("loss/badterm.term is not finite" in said) == (kind is BadTerm)
    assert sorted(path.name for path in (tmp_path / "run" / "nonfinite").iterdir()) == [
        "step-00000003.json",
        "step-00000004.json",
    ]


def test_what_the_device_alone_knows_keeps_the_average_still_too():
    """The outcome stays on the device where the optimizer takes found_inf."""
    model = torch.nn.Linear(2, 2)
    average, other = WeightAverage(model, 0.5), WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight += 1
    before = average.values["weight"].clone()
    average.update(9, torch.tensor(1.0))
    assert average.values["weight"].equal(before)
    average.update(9, torch.tensor(0.0))
    other.update(9, False)
    torch.testing.assert_close(average.values["weight"], other.values["weight"])
    assert not average.values["weight"].equal(before)


def test_the_guard_says_whether_a_step_was_void(monkeypatch):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    cpu, one, nan = torch.device("cpu"), torch.tensor(1.0), torch.tensor(NAN)
    guard = FiniteGuard(optimizer, cpu, window=2)
    assert (guard.step(1, one, one), guard.step(2, one, nan)) == (False, True)
    monkeypatch.setattr("apt_core.training.step.finite_guard.decides_on_device", lambda *_: True)
    guard = FiniteGuard(optimizer, cpu, window=2)
    parameter.grad = torch.ones(2)
    assert [float(guard.step(step, loss, one)) for step, loss in enumerate((one, nan), 1)] == [0, 1]
    assert guard.known == 0  # nobody has waited for the device
    assert guard.read() == (1, 1, [2])
    assert guard.known == 1


class Plan:
    """Keeps the plan of the run."""

    @hookimpl
    def on_training_start(self, trainer: Any) -> None:
        self.plan = trainer.parts.plan


def test_the_dump_of_a_bad_step_holds_its_windows_and_ids(tmp_path):
    """In the second epoch, of a step of two micro-batches."""
    keeper = Plan()
    tiny_run(
        keeper,
        BadGradient({10}),
        steps=12,
        output=tmp_path / "run",
        overrides={"training.grad_accum_steps": 2},
    )
    plan = keeper.plan
    epoch, index = divmod(10 - 1, plan.steps_per_epoch)
    dump = json.loads((tmp_path / "run" / "nonfinite" / "step-00000010.json").read_text())
    assert (dump["step"], dump["epoch"]) == (10, epoch + 1) == (10, 2)
    assert dump["windows"] == plan.drawn(epoch + 1, index).windows.tolist()
    given = [batch.input_ids for batch in plan.step(epoch + 1, index).batches]
    assert len(given) == 2
    assert dump["input_ids"] == torch.cat(given).tolist()
    again = Batch.of_rows(plan.sources[0].rows(np.array(dump["windows"])))
    assert again.input_ids.tolist() == dump["input_ids"]


def test_at_most_20_steps_are_dumped_and_the_count_goes_on_after_a_resume(tmp_path):
    bad = BadGradient(set(range(1, 100)))
    options = {"output": tmp_path / "run", "overrides": {"training.max_nonfinite_steps": 99}}
    first = tiny_run(bad, stop_at_step=14, **options)
    assert first.result.figures["skipped_steps"] == 14
    with pytest.raises(DivergedError, match="ended in 24 steps in a row"):
        tiny_run(bad, resume=True, **options)
    figures = json.loads((tmp_path / "run" / "manifest.json").read_text())["figures"]
    assert figures["steps"] == figures["skipped_steps"] == 24
    dumped = sorted((tmp_path / "run" / "nonfinite").iterdir())
    assert [path.name for path in dumped] == [f"step-{n:08d}.json" for n in range(1, 21)]


def test_a_bad_step_after_the_last_row_is_told_too(tmp_path):
    overrides = {"training.log_every_steps": 4}
    output = tmp_path / "run"
    run = tiny_run(BadGradient({5}), stop_at_step=5, overrides=overrides, output=output)
    assert run.result.figures["skipped_steps"] == 1
    assert "changed nothing: step 5" in (output / "log.txt").read_text()
    assert (output / "nonfinite" / "step-00000005.json").is_file()


FAILS_FROM = """
from apt_core import hookimpl

@hookimpl
def on_backward_end(step, trainer):
    if step >= {step}:
        next(trainer.model.parameters()).grad[0, 0] = float("nan")
"""


def test_too_many_in_a_row_end_the_run_with_a_usable_checkpoint(apt_train, tmp_path):
    plugin = tmp_path / "failing.py"
    plugin.write_text(FAILS_FROM.format(step=4))
    limit = ("--training.max_nonfinite_steps", "3")
    run = apt_train(*limit, "--plugin", str(plugin))
    assert run.code == 1
    assert "3 steps in a row" in run.err and "the last one step 6" in run.err
    assert "training.learning_rate" in run.err
    assert run.checkpoints[-1].name == "step-00000006"
    assert run.manifest["status"] == "failed"
    # A counter that was put back to nothing would let three more pass.
    again = apt_train(*limit, "--plugin", str(plugin), "--resume")
    assert again.code == 1 and "5 steps in a row" in again.err
    well = apt_train(*limit, "--resume")
    assert well.code == 0, well.err
    assert "skipped steps, which were not finite: 5; see nonfinite/" in well.out


# Memory

LARGE = """
import resource
from apt_core import hookimpl

@hookimpl
def on_step_start(step):
    if step == 2:
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + 400 * 2**20
        open({limit!r}, "w").write(str(limit))
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc")
def test_what_is_advised_without_memory_fits_and_the_run_goes_on(
    apt_train, profile, tmp_path, in_children
):
    """The address space becomes small in step 2, of a model whose logits take nearly a GiB."""
    (tmp_path / "text.txt").write_text(TEXT * 20)
    plugin, limit = tmp_path / "large.py", tmp_path / "limit"
    plugin.write_text(LARGE.format(limit=str(limit)))
    large = ("--model.vocab_size", "8192", "--data.max_length", "128", "--model.max_seq_len", "128",
             "--training.max_steps", "3", "--evaluation.eval_freq", "0",
             "--evaluation.eval_batches", "1", "--evaluation.sample_tokens", "0",
             "--hardware.num_threads", "1")  # fmt: skip

    def runs_out() -> None:
        one_arena()
        ended(apt_train(*large, "--training.batch_size", "64", "--plugin", str(plugin)))

    assert in_children(runs_out, lambda: None) == [1, 0]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    advice = manifest["error"]
    assert advice.startswith("out of memory in step 2: about ")
    there = re.search(r"(\d+) MiB are there", advice)
    assert there and int(there[1]) < 400, "what libraries hold is not there for the run"
    found = re.search(r"(--training.batch_size) (\d+) (--training.grad_accum_steps) (\d+)$", advice)
    assert found and int(found[2]) * int(found[4]) == 64
    (kept,) = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoint.load(kept).state.step == 1

    def goes_on() -> None:
        one_arena()
        bytes_ = int(limit.read_text())
        resource.setrlimit(resource.RLIMIT_AS, (bytes_, bytes_))
        run = apt_train(*large, *found.groups(), "--resume", "--debug")
        (tmp_path / "told").write_text(run.out + run.err)
        ended(run)

    (code,) = in_children(goes_on)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    told = (tmp_path / "told").read_text()
    assert (code, manifest["status"], manifest["step"]) == (0, "finished", 3), told


def one_arena() -> None:
    """Let all threads of this process share one heap of glibc: others reserve address space, which
    is limited here, without using it, and how many there are depends on timing."""
    with suppress(AttributeError):  # another C library has none
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX


def ended(run: Any) -> None:
    """End this process as the run has ended."""
    os._exit(run.code)


STUB = """
import torch
from apt_core import ProviderSpec, hookimpl

class Layer(torch.nn.Linear):
    def forward(self, x):
        if self.training:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(x)

class Provider:
    def __init__(self, config): pass
    def create_layer(self, d_model, d_ff, dropout=0.0): return Layer(d_model, d_model)

@hookimpl
def apt_register_providers():
    return [ProviderSpec("ffn", "hungry", Provider)]
"""


def test_a_gpu_without_memory_is_told_with_the_settings_and_a_checkpoint(apt_train, tmp_path):
    plugin = tmp_path / "hungry.py"
    plugin.write_text(STUB)
    # The registry tries a layer out first, and counts the memory of one.
    run = apt_train("--plugin", str(plugin), "--model.ffn_name", "hungry")
    assert run.code == 1
    step = run.manifest["step"]
    assert f"out of memory in step {step + 1}: " in run.err
    assert "training.batch_size" in run.err and "Traceback" not in run.err
    assert run.checkpoints[-1].name == f"step-{step:08d}"
    assert "to go on: apt-train" in run.err


def test_a_model_that_memory_does_not_hold_is_told_before_the_run(apt_train, monkeypatch):
    class Refused(ModelBuilder):
        def build_model(self, **options: bool) -> torch.nn.Module:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] can't allocate memory")

    monkeypatch.setattr("apt_core.training.prepare.ModelBuilder", Refused)
    run = apt_train()
    assert run.code == 1
    assert "error: out of memory before the first step: about " in run.err
    assert not run.folder.exists()


class Hungry:
    """Fails for lack of memory in a hook of its own."""

    @hookimpl
    def on_step_end(self, step: int) -> None:
        if step == 2:
            raise MemoryError("for a plot")


def test_a_plugin_that_gets_no_memory_fails_alone():
    run = tiny_run(Hungry(), steps=4, strict=False)
    assert run.result.status == "finished"
    (failure,) = run.manager.records["hungry"].failures
    assert failure.error == "MemoryError: for a plot"
    with pytest.raises(PluginError, match="plugin hungry failed in on_step_end at step 2"):
        tiny_run(Hungry(), steps=4)


# Signals


def slowed(write: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return write(*arguments, **options)

    return slow


class Signals:
    """Sends signals to its own process after a step."""

    def __init__(self, step: int, *numbers: int) -> None:
        self.step, self.numbers = step, numbers

    @hookimpl
    def on_step_end(self, step: int) -> None:
        if step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_waits_for_the_checkpoint_that_is_being_written(
    tmp_path, monkeypatch, number, code
):
    monkeypatch.setattr(checkpoint, "save", slowed(checkpoint.save, 0.2))
    run = tiny_run(
        Signals(5, number),
        output=tmp_path / "run",
        overrides={"training.save_every_steps": 4, "training.keep_last": 0},
    )
    assert (run.result.status, run.result.exit_code) == ("interrupted", code)
    kept = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [checkpoint.load(path).state.step for path in kept] == [4, 5]


def test_a_second_signal_insists(tmp_path):
    """It does not wait for the end of the step's hooks."""
    reached = []

    class After:
        @hookimpl(priority=90)
        def on_step_end(self, step: int) -> None:
            reached.append(step)

    with pytest.raises(KeyboardInterrupt):
        tiny_run(Signals(3, signal.SIGINT, signal.SIGINT), After(), output=tmp_path / "run")
    assert reached == [1, 2]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"
    (kept,) = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoint.load(kept).state.step == 3


INSISTS = """
import os
from apt_core import hookimpl

@hookimpl
def on_step_end(step):
    if step == 3:
        for number in ({first}, {second}):
            os.kill(os.getpid(), number)
"""


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (signal.SIGTERM, signal.SIGTERM, 143),
        (signal.SIGINT, signal.SIGTERM, 143),
        (signal.SIGTERM, signal.SIGINT, 130),
        (signal.SIGTERM, signal.SIGHUP, 129),
    ],
)
def test_the_exit_code_is_that_of_the_signal_that_ended_the_run(
    apt_train, tmp_path, first, second, code
):
    plugin = tmp_path / "insists.py"
    plugin.write_text(INSISTS.format(first=int(first), second=int(second)), encoding="utf-8")
    run = apt_train("--plugin", str(plugin))
    assert (run.code, run.manifest["status"]) == (code, "interrupted")
    assert "interrupted\n" in run.err and "Traceback" not in run.err


# The disk


FILLS = """
import logging
import os
from apt_core import hookimpl

BALLAST = {ballast!r}

@hookimpl
def on_step_start(step, trainer):
    trainer._run.saving.finish()  # which step meets the full disk is no matter of luck
    if step == {first}:
        with open(BALLAST, "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
    if step == {last}:
        os.remove(BALLAST)
    logging.getLogger("apt.fills").debug("more than a page: %s", "x" * 5000)

@hookimpl
def apt_metrics():
    return {{f"more_than_a_page_{{n}}": n for n in range(200)}}
"""

SAVES = ("--debug.log_level", "DEBUG", "--training.save_every_steps", "2",
         "--training.keep_last", "0", "--training.log_every_steps", "1",
         "--training.max_steps", "10", "--evaluation.eval_freq", "0")  # fmt: skip


def filling(tmp_path: Path, disk: Path, first: int, last: int) -> tuple[str, str]:
    plugin = tmp_path / "fills.py"
    plugin.write_text(FILLS.format(ballast=str(disk / "ballast"), first=first, last=last))
    return "--plugin", str(plugin)


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints, each of which is intact."""
    found = checkpoint.list_checkpoints(folder / "checkpoints")
    return [checkpoint.load(path).state.step for path in found]


def test_a_disk_that_is_full_for_a_while_costs_the_checkpoints_of_that_time(
    apt_train, tmp_path, small_disk
):
    run = apt_train(*SAVES, *filling(tmp_path, small_disk, 5, 9), name="disk/run")
    assert run.code == 0, run.err
    assert steps_in(run.folder) == [2, 4, 10]
    said = run.out + run.err
    assert "Traceback" not in said and "Logging error" not in said
    assert said.count("log.txt is incomplete: [Errno 28] No space left on device") == 1
    assert said.count("metrics.jsonl: rows wait for room on the disk") == 1
    assert "checkpoints that could not be written: 2; see manifest.json" in run.out
    assert [text.split(" was ")[0] for text in run.manifest["failed_checkpoints"]] == [
        "the checkpoint of step 6",
        "the checkpoint of step 8",
    ]
    assert [row["step"] for row in run.metrics if "loss" in row] == list(range(1, 11))
    assert list((run.folder / "checkpoints").glob(".*")) == []


def test_a_disk_that_stays_full_fails_the_run_at_its_end_and_it_goes_on_with_room(
    apt_train, tmp_path, small_disk
):
    whole = apt_train(*SAVES, name="whole")
    run = apt_train(*SAVES, *filling(tmp_path, small_disk, 5, 99), name="disk/run")
    assert run.code == 1
    said = run.out + run.err
    assert "error: the checkpoint of step 10 was not written: " in run.err
    assert "No space left on device" in run.err
    assert "Traceback" not in said and "Logging error" not in said
    assert "to go on: apt-train" in run.err
    assert steps_in(run.folder) == [2, 4]
    json.loads((run.folder / "manifest.json").read_text())  # the one of before, whole
    (small_disk / "ballast").unlink()
    again = apt_train(*SAVES, "--resume", name="disk/run")
    assert again.code == 0, again.err
    assert whole.same_weights(again)


def test_a_run_on_a_full_disk_says_so_and_does_not_break(apt_train, tmp_path, small_disk):
    """From the very beginning: no profile, no manifest, no log, no rows."""
    with (small_disk / "ballast").open("wb", buffering=0) as file, pytest.raises(OSError):
        while file.write(bytes(4096)):
            pass
    run = apt_train("--training.max_steps", "2", name="disk/run")
    assert run.code == 1
    assert "Traceback" not in run.out + run.err and "Logging error" not in run.out + run.err
    assert "No space left on device" in run.err


# Programs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.long
def test_a_compiled_model_evaluates_saves_and_resumes(apt_train):
    """Under the names that it has without being compiled."""
    plain = apt_train("--training.max_steps", "6", name="plain")
    compiled = ("--training.max_steps", "6", "--training.compile", "true")
    stopped = apt_train(*compiled, "--stop-at-step", "3")
    assert stopped.code == 0, stopped.err
    assert stopped.weights().keys() == plain.weights().keys()
    run = apt_train(*compiled, "--resume")
    assert run.code == 0, run.err
    figures = [r.manifest["figures"]["val_loss"] for r in (plain, run)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)
    rows = [[row["loss"] for row in r.metrics if "loss" in row] for r in (plain, run)]
    assert rows[1] == pytest.approx(rows[0], rel=1e-4)
