"""Checkpoints: complete and intact or not there, written while the run goes on."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import random
import resource
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_core import hookimpl
from apt_core.errors import CheckpointError, StopTraining, TrainingError
from apt_core.runs import checkpoint, open_run
from apt_core.testing import TINY_PROFILE, tiny_run
from apt_core.testing.tiny import TEXT
from apt_core.training.evaluating import Evaluation, Evaluator
from apt_core.training.saving import Saving

QUIET = {
    "training.log_every_steps": 1,
    "evaluation.eval_freq": 0,
    "evaluation.sample_tokens": 0,
    "hardware.num_threads": 1,
}


def steps_of(root: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.list_checkpoints(root)]


# Killed at any moment ------------------------------------------------------------------------

KILLS = 20
HEAVY = {
    **QUIET,
    "model.d_model": 128,
    "model.num_layers": 1,
    "model.d_ff": 512,
    "training.batch_size": 1,
    "training.max_epochs": 1000,
    "training.save_every_steps": 1,
    "training.keep_last": 2,
    "evaluation.eval_batches": 1,
}
"""Steps of one window, and 3 MB to write after each: nearly all the time goes into saving."""


class Tells:
    """Writes a byte into a pipe when the first checkpoint of this process is on its way."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    @hookimpl
    def apt_state_dict(self) -> dict[str, Any]:
        if self.pipe:
            os.write(self.pipe, b"!")
            self.pipe = 0
        return {}


@pytest.mark.long
def test_runs_are_killed_while_saving_and_every_restart_goes_on_from_an_intact_checkpoint(tmp_path):
    folder, root = tmp_path / "run", tmp_path / "run" / "checkpoints"
    delays = random.Random(4)
    # What is imported and measured once is then there in every child.
    tiny_run(overrides={**HEAVY, "training.max_epochs": 1}, stop_at_step=1)
    newest = unfinished = 0
    for kill in range(KILLS):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                tiny_run(Tells(writing), overrides=HEAVY, output=folder, resume=kill > 0)
            finally:
                os._exit(1)
        os.close(writing)
        assert select.select([reading], [], [], 60)[0] and os.read(reading, 1), "it did not train"
        # Between no time and that of several checkpoints; now and then for as long as one takes.
        select.select([], [], [], delays.uniform(0.0, 0.12))
        tries = 0 if kill % 8 else 10_000
        while tries and max(steps_of(root), default=0) <= newest:
            time.sleep(0.005)
            tries -= 1
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(reading)

        unfinished += bool(list(root.glob(".step-*.tmp")))
        visible = steps_of(root)
        if not visible:
            assert newest == 0
            continue
        found = checkpoint.load(checkpoint.list_checkpoints(root)[-1])
        assert found.state.step == visible[-1] >= newest
        if newest:
            log = (folder / "log.txt").read_text(encoding="utf-8").splitlines()
            assert f"(step {newest})" in [line for line in log if "resumed from" in line][-1]
        newest = visible[-1]
    assert newest > 2
    assert unfinished > 2
    result = tiny_run(
        overrides={**HEAVY, "training.save_every_steps": 10**6},
        output=folder, resume=True, stop_at_step=newest + 1,
    ).result  # fmt: skip
    assert result.step == newest + 1
    assert not list(root.glob(".step-*.tmp"))


# Damaged -------------------------------------------------------------------------------------


def rank(number: str, port: int, folder: Path, text: Path) -> None:
    """One of two processes that train a sharded model and save it twice."""
    os.environ.update(WORLD_SIZE="2", RANK=number, LOCAL_RANK=number)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    tiny_run(
        profile={**TINY_PROFILE, "data": {"train_path": str(text)}},
        overrides={**QUIET, "hardware.distributed": "fsdp", "training.save_every_steps": 2},
        steps=4, output=folder,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["whole", "sharded"])
def saved(request, tmp_path_factory) -> Path:
    """A folder with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "whole":
        changes = {**QUIET, "training.save_every_steps": 2, "training.ema_decay": 0.9}
        tiny_run(overrides=changes, steps=4, output=folder / "run")
    else:
        (folder / "text.txt").write_text(TEXT, encoding="utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for number in ("0", "1"):
            child = os.fork()
            if child == 0:
                try:
                    rank(number, port, folder / "run", folder / "text.txt")
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert steps_of(folder / "run" / "checkpoints") == [2, 4]
    return folder / "run" / "checkpoints"


@pytest.fixture
def root(saved, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def the_previous_is_used(root: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Says why the newest was not."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "apt.checkpoint"):
        assert checkpoint.newest_intact(root).state.step == 2
    (message,) = caplog.messages
    assert message.startswith("checkpoint skipped: ") and "step-00000004" in message
    return message


def test_a_checkpoint_opens_in_one_process_whole_or_sharded(root):
    session = open_run(root, step=2)
    saved = checkpoint.load(root / "step-00000002").tensors("model")
    whole = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in saved.shapes.items()}
    saved.read_into(whole, "model")
    assert all(session.model.state_dict()[name].equal(value) for name, value in whole.items())
    with session.computing():
        assert session.model(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("how", ["missing", "empty", "cut by a byte", "cut in half"])
def test_a_newest_checkpoint_with_a_cut_file_is_not_used(root, caplog, how):
    newest = root / "step-00000004"
    for path in files(newest):
        data = path.read_bytes()
        if how == "missing":
            path.unlink()
        else:
            kept = {"empty": 0, "cut by a byte": len(data) - 1, "cut in half": len(data) // 2}[how]
            # The manifest ends in a line break, which says nothing.
            path.write_bytes(data[: kept - (path.name == "manifest.json" and kept > 1)])
        if (path.name, how) != ("evaluation.json", "missing"):
            assert path.name in the_previous_is_used(root, caplog)
        path.write_bytes(data)
    assert checkpoint.newest_intact(root).state.step == 4


def test_a_flipped_bit_in_any_file_is_noticed(root, caplog):
    newest, places = root / "step-00000004", random.Random(1)
    for path in files(newest):
        data = path.read_bytes()
        # The manifest's bits all count, but for those that make another white space of one.
        bits = sorted({0, len(data) * 8 - 9, *(places.randrange(len(data) * 8) for _ in range(4))})
        for bit in bits:
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            if bytes(changed).split() == data.split():
                continue
            path.write_bytes(changed)
            the_previous_is_used(root, caplog)
        path.write_bytes(data)


def test_what_the_manifest_does_not_list_is_not_read(root, caplog):
    newest = root / "step-00000004"
    shard = next(iter(newest.rglob("*.safetensors")))
    for stray in (shard.with_name("stray.safetensors"), newest / "ema" / "stray.safetensors"):
        stray.parent.mkdir(exist_ok=True)
        shutil.copy(shard, stray)
        assert "stray.safetensors: the manifest does not list it" in the_previous_is_used(
            root, caplog
        )
        stray.unlink()
        stray.symlink_to("/dev/null")
        the_previous_is_used(root, caplog)
        stray.unlink()
    assert checkpoint.newest_intact(root).state.step == 4


class Opened:
    """Names of the files that were opened while it was active."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.active = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: Any) -> None:
        if self.active and event == "open":
            self.names.append(str(arguments[0]))


@pytest.fixture(scope="module")
def hook() -> Opened:
    """An audit hook stays as long as its process: one is enough."""
    return Opened()


@pytest.fixture
def opened(hook) -> Iterator[list[str]]:
    hook.names.clear()
    hook.active = True
    yield hook.names
    hook.active = False


@pytest.mark.parametrize("name", ["../../../outside", "/dev/null", "model/../../../../outside"])
def test_a_manifest_cannot_have_other_files_opened(root, caplog, opened, vouch, name):
    outside = root.parent / "outside"
    outside.write_text("secret", encoding="utf-8")
    vouch(root / "step-00000004", {name: "0" * 64})
    opened.clear()
    assert f"there is no file {name!r}" in the_previous_is_used(root, caplog)
    assert any(path.endswith("manifest.json") for path in opened)
    assert not [path for path in opened if path.endswith("outside") or path.startswith("/dev")]


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "profile.yaml"])
def test_a_device_in_place_of_a_file_is_not_read(root, caplog, opened, name):
    path = root / "step-00000004" / name
    path.unlink()
    path.symlink_to("/dev/null")
    the_previous_is_used(root, caplog)
    assert not [opened_ for opened_ in opened if opened_ == str(path)]


def test_where_nothing_is_intact_every_reason_is_told(root):
    for folder in checkpoint.list_checkpoints(root):
        (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000004.*step-00000002"):
        checkpoint.newest_intact(root)


# Written in the background -------------------------------------------------------------------


class Watcher:
    """What happened, in its order."""

    def __init__(self) -> None:
        self.happened: list[Any] = []

    @hookimpl
    def on_step_end(self, step: int) -> None:
        self.happened.append(step)

    @hookimpl
    def on_checkpoint_saved(self, path: Path, trainer: Any) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert checkpoint.load(path).state.step == int(path.name.removeprefix("step-"))
        self.happened.append(path.name)


def test_the_run_goes_on_while_a_checkpoint_is_written(monkeypatch):
    """The writer waits for a step that comes after the save; a loop that waited would never end."""
    watcher, release, write = Watcher(), threading.Event(), checkpoint.write_whole

    def slow(stem: Path, tensors: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert release.wait(60), "the loop waits for the writer"
        write(stem, tensors)

    class Releases:
        @hookimpl
        def on_step_end(self, step: int) -> None:
            if step == 5:
                assert "step-00000003" not in watcher.happened
                release.set()

    monkeypatch.setattr(checkpoint, "write_whole", slow)
    tiny_run(watcher, Releases(), steps=5, overrides={**QUIET, "training.save_every_steps": 3})
    happened = watcher.happened
    assert happened[:5] == [1, 2, 3, 4, 5]
    assert happened[5:] == ["step-00000003", "step-00000005"]


def test_a_save_waits_for_the_one_before(monkeypatch):
    release, write, finish = threading.Event(), checkpoint.write_whole, Saving.finish
    watcher = Watcher()
    happened = watcher.happened

    def slow(stem: Path, tensors: Any) -> None:
        happened.append(("begin", stem.parent.name))
        assert release.wait(60)
        write(stem, tensors)
        happened.append(("end", stem.parent.name))

    def waiting(self: Saving) -> None:
        if self._write is not None:
            happened.append("waits")
            release.set()
        finish(self)

    monkeypatch.setattr(checkpoint, "write_whole", slow)
    monkeypatch.setattr(Saving, "finish", waiting)
    changes = {**QUIET, "training.save_every_steps": 1, "training.keep_last": 0}
    tiny_run(watcher, steps=2, overrides=changes)
    first, second = ".step-00000001.tmp", ".step-00000002.tmp"
    order = [("end", first), "step-00000001", ("begin", second), ("end", second), "step-00000002"]
    places = [happened.index(what) for what in order]
    assert places == sorted(places)


def test_a_plugin_that_stops_when_it_is_told_of_a_checkpoint_does_not_cost_the_last(tmp_path):
    class Stops:
        @hookimpl
        def on_checkpoint_saved(self) -> None:
            raise StopTraining("enough")

    changes = {**QUIET, "training.save_every_steps": 3, "training.log_every_steps": 10}
    run = tiny_run(Stops(), steps=5, overrides=changes, output=tmp_path / "run")
    assert run.result.step == 5
    assert steps_of(tmp_path / "run" / "checkpoints") == [3, 5]


def test_an_interrupt_while_waiting_for_the_writer_leaves_it_alone(tmp_path, monkeypatch):
    """There is one writer: what it began, it ends, and the run ends after it."""
    finish, write, at_once = Saving.finish, checkpoint.write_whole, threading.Lock()

    def slow(stem: Path, tensors: Any) -> None:
        assert at_once.acquire(blocking=False), "two writers"
        with_time = threading.Event()
        with_time.wait(0.05)
        write(stem, tensors)
        at_once.release()

    class Interrupted:
        def __init__(self, future: Any) -> None:
            self.future, self.done = future, future.done

        def result(self) -> Path:
            self.result = self.future.result
            raise KeyboardInterrupt

        def exception(self) -> Any:
            return self.future.exception()

    def interrupted(self: Saving) -> None:
        if self._write is not None and self._run.progress.step == 4:
            self._write = replace(self._write, future=Interrupted(self._write.future))
        finish(self)

    monkeypatch.setattr(checkpoint, "write_whole", slow)
    monkeypatch.setattr(Saving, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(steps=4, overrides=QUIET, output=tmp_path / "run")
    assert steps_of(tmp_path / "run" / "checkpoints") == [4]
    checkpoint.newest_intact(tmp_path / "run" / "checkpoints")


def test_an_interrupt_after_a_step_leaves_no_gap_in_the_rows(tmp_path):
    """The checkpoint of the emergency has the step, which no resume takes again."""

    class Interrupts:
        @hookimpl
        def on_step_end(self, step: int) -> None:
            if step == 2:
                raise KeyboardInterrupt

    changes = {**QUIET, "training.log_every_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        tiny_run(Interrupts(), steps=4, overrides=changes, output=tmp_path / "run")
    assert steps_of(tmp_path / "run" / "checkpoints") == [2]
    resumed = tiny_run(steps=4, overrides=changes, output=tmp_path / "run", resume=True)
    whole = tiny_run(steps=4, overrides=changes)
    figures = [[(row["step"], row["loss"]) for row in run.metrics if "loss" in row]
               for run in (resumed, whole)]  # fmt: skip
    assert figures[0] == figures[1]


@pytest.mark.parametrize("hook", ["on_step_start", "apt_loss_terms", "on_step_end", "on_metrics"])
def test_a_checkpoint_of_the_middle_of_a_step_says_whose_state_is_ahead(tmp_path, caplog, hook):
    """Not so where every hook of the step has been called."""

    class Counts:
        """Keeps how many steps it has seen begin."""

        def __init__(self) -> None:
            self.seen = 0

        @hookimpl
        def on_step_start(self) -> None:
            self.seen += 1

        @hookimpl
        def apt_state_dict(self) -> dict[str, int]:
            return {"seen": self.seen}

        @hookimpl
        def apt_load_state_dict(self, state: dict[str, int]) -> None:
            self.seen = state["seen"]

    calls = itertools.count(1)

    def dies() -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    dying = type("Dying", (), {hook: staticmethod(hookimpl(specname=hook, priority=90)(dies))})
    output, changes = tmp_path / "run", {**QUIET, "training.log_every_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        tiny_run(Counts(), dying(), steps=6, overrides=changes, output=output)
    (saved,) = checkpoint.list_checkpoints(output / "checkpoints")
    manifest = checkpoint.load(saved).manifest
    tiny_run(Counts(), steps=6, overrides=changes, output=output, resume=True)
    told = "written in the middle of a step" in caplog.text
    assert told is ("in_step" in manifest) is (hook != "on_metrics")
    assert manifest.get("in_step", ["counts"]) == ["counts"]


def test_the_snapshot_is_of_its_moment(tmp_path, monkeypatch):
    """What the steps after it change does not get into the file."""
    release, write = threading.Event(), checkpoint.write_whole

    def late(stem: Path, tensors: Any) -> None:
        assert release.wait(60)
        write(stem, tensors)

    class Releases:
        @hookimpl
        def on_step_end(self, step: int) -> None:
            if step == 4:
                release.set()

    changes = {**QUIET, "training.save_every_steps": 2, "training.ema_decay": 0.9}
    tiny_run(output=tmp_path / "plain", steps=4, overrides=changes)
    monkeypatch.setattr(checkpoint, "write_whole", late)
    tiny_run(Releases(), output=tmp_path / "late", steps=4, overrides=changes)
    for name in ("model", "optimizer", "ema"):
        files = [
            tmp_path / run / "checkpoints" / "step-00000002" / f"{name}.safetensors"
            for run in ("plain", "late")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


def failing(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """A disk that is full when the optimizer's state of these steps comes."""
    write = checkpoint.write_whole

    def full(stem: Path, tensors: Any) -> None:
        if stem.name == "optimizer" and any(f"{step:08d}" in stem.parent.name for step in steps):
            stem.with_suffix(".safetensors").write_bytes(b"a part")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(stem, tensors)

    monkeypatch.setattr(checkpoint, "write_whole", full)


def test_a_write_that_fails_costs_one_checkpoint_and_says_so(tmp_path, monkeypatch, caplog):
    failing(monkeypatch, 4)
    watcher = Watcher()
    changes = {**QUIET, "training.save_every_steps": 2, "training.keep_last": 2}
    run = tiny_run(watcher, output=tmp_path / "run", steps=8, overrides=changes)
    root = tmp_path / "run" / "checkpoints"
    assert (run.result.status, run.result.step) == ("finished", 8)
    assert [name for name in watcher.happened if isinstance(name, str)] == [
        "step-00000002", "step-00000006", "step-00000008",
    ]  # fmt: skip
    assert [path.name for path in sorted(root.iterdir())] == ["step-00000006", "step-00000008"]
    (failure,) = run.manifest["failed_checkpoints"]
    assert "step 4" in failure and "No space left" in failure
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "step 4 was not written" in error.getMessage()


def test_a_failed_write_prunes_nothing(tmp_path, monkeypatch):
    failing(monkeypatch, 4, 6)
    changes = {**QUIET, "training.save_every_steps": 2, "training.keep_last": 1}
    with pytest.raises(TrainingError, match="No space left"):
        tiny_run(output=tmp_path / "run", steps=6, overrides=changes)
    root = tmp_path / "run" / "checkpoints"
    assert [path.name for path in root.iterdir()] == ["step-00000002"]
    assert checkpoint.newest_intact(root).state.step == 2


class FullDisk:
    """From step 3 to step 6 no file grows beyond the size that metrics.jsonl then has and a part of
    a row; at the end, beyond 100 bytes."""

    @hookimpl
    def on_step_end(self, step: int, trainer: Any) -> None:
        if step == 3:
            size = (trainer.output_dir / "metrics.jsonl").stat().st_size
            self._limit(size + 30)
        if step == 6:
            self._limit(resource.RLIM_INFINITY)

    @hookimpl
    def on_training_end(self) -> None:
        self._limit(100)

    def _limit(self, size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_keeps_rows_waiting_and_ends_no_run(tmp_path, in_children):
    """In a process of its own, with a limit on the size of files."""

    def train() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        tiny_run(FullDisk(), output=tmp_path / "run", steps=8, overrides=QUIET)

    assert in_children(train) == [0]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(row)["step"] for row in rows if "grad_norm" in row]
    assert steps == list(range(1, 9))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "finished"
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_row_that_was_cut_in_a_letter_is_dropped_by_the_resume(tmp_path):
    tiny_run(output=tmp_path / "run", overrides=QUIET, stop_at_step=3)
    path = tmp_path / "run" / "metrics.jsonl"
    with path.open("ab") as file:
        file.write('{"step": 4, "数'.encode()[:-1])
    tiny_run(output=tmp_path / "run", overrides=QUIET, steps=None, resume=True, stop_at_step=5)
    steps = [json.loads(row)["step"] for row in path.read_text(encoding="utf-8").splitlines()]
    assert sorted(set(steps)) == [0, 1, 2, 3, 4, 5]


# Kept and pruned -----------------------------------------------------------------------------


def watched(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Let the watched loss after a step be the one given."""
    evaluate = Evaluator.evaluate

    def scripted(self: Evaluator, *, everything: bool) -> Evaluation | None:
        found = evaluate(self, everything=everything)
        if found is None:
            return None  # told to stop meanwhile
        return Evaluation(found.scores, losses.get(self._kernel.manager.step, 9.0))

    monkeypatch.setattr(Evaluator, "evaluate", scripted)


BEST = {
    **QUIET,
    "evaluation.eval_freq": 2,
    "evaluation.save_best": True,
    "training.keep_last": 1,
    "training.save_freq": 0,
}


def test_the_checkpoint_of_the_lowest_loss_is_kept(tmp_path, monkeypatch):
    watched(monkeypatch, {2: 3.0, 4: 1.0, 6: float("nan"), 8: 1.0})
    tiny_run(output=tmp_path / "run", steps=9, overrides=BEST)
    assert steps_of(tmp_path / "run" / "checkpoints") == [4, 9]


def test_a_resume_keeps_the_best_and_finds_a_better_one(tmp_path, monkeypatch):
    watched(monkeypatch, {2: 1.0, 8: 0.5, 10: 0.7})
    root = tmp_path / "run" / "checkpoints"
    tiny_run(output=tmp_path / "run", stop_at_step=5, overrides=BEST)
    assert steps_of(root) == [2, 5]
    tiny_run(output=tmp_path / "run", stop_at_step=7, overrides=BEST, resume=True)
    assert steps_of(root) == [2, 7]
    tiny_run(output=tmp_path / "run", stop_at_step=11, overrides=BEST, resume=True)
    assert steps_of(root) == [8, 11]


def test_a_best_that_was_not_written_does_not_replace_the_best_that_was(tmp_path, monkeypatch):
    failing(monkeypatch, 4)
    watched(monkeypatch, {2: 3.0, 4: 1.0})
    tiny_run(output=tmp_path / "run", steps=7, overrides=BEST)
    assert steps_of(tmp_path / "run" / "checkpoints") == [2, 7]


class Interrupts:
    """Is told to stop in one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @hookimpl
    def on_step_end(self, step: int) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_best_that_was_not_written_bars_no_other(tmp_path, monkeypatch):
    """Neither in its part of the run nor after a resume, and the one before stays meanwhile."""
    failing(monkeypatch, 4)
    watched(monkeypatch, {2: 3.0, 4: 1.0, 8: 2.0, 10: 2.5})
    root = tmp_path / "run" / "checkpoints"
    tiny_run(output=tmp_path / "run", stop_at_step=6, overrides=BEST)
    assert steps_of(root) == [2, 6]
    tiny_run(output=tmp_path / "run", stop_at_step=7, overrides=BEST, resume=True)
    assert steps_of(root) == [2, 7]
    tiny_run(output=tmp_path / "run", stop_at_step=11, overrides=BEST, resume=True)
    assert steps_of(root) == [8, 11]


def test_save_best_that_is_switched_on_and_off_keeps_the_best_that_there_is(tmp_path, monkeypatch):
    watched(monkeypatch, {2: 1.0, 4: 3.0, 6: 2.0, 8: 2.5, 10: 4.0})
    root, off = tmp_path / "run" / "checkpoints", {"evaluation.save_best": False}
    every = {**BEST, **off, "training.save_every_steps": 2, "training.keep_last": 2}
    tiny_run(output=tmp_path / "run", stop_at_step=6, overrides=every)
    assert steps_of(root) == [4, 6]
    tiny_run(output=tmp_path / "run", stop_at_step=9, overrides=BEST, resume=True)
    assert steps_of(root) == [6, 9]
    tiny_run(output=tmp_path / "run", stop_at_step=10, overrides={**BEST, **off}, resume=True)
    assert steps_of(root) == [10]
    tiny_run(output=tmp_path / "run", stop_at_step=11, overrides=BEST, resume=True)
    assert steps_of(root) == [10, 11]


def test_the_best_of_other_windows_stays_until_there_is_one_of_these(tmp_path, monkeypatch):
    watched(monkeypatch, {2: 1.0, 8: 3.0, 10: 2.0})
    root, one = tmp_path / "run" / "checkpoints", {"evaluation.eval_batches": 1}
    tiny_run(output=tmp_path / "run", stop_at_step=3, overrides={**BEST, **one})
    assert steps_of(root) == [2, 3]
    other = {**BEST, "evaluation.eval_freq": 4}
    tiny_run(Interrupts(6), output=tmp_path / "run", overrides={**BEST, **QUIET}, resume=True)
    assert steps_of(root) == [2, 6]
    tiny_run(output=tmp_path / "run", stop_at_step=9, overrides=other, resume=True)
    assert steps_of(root) == [8, 9]
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert "step-00000002 is the best checkpoint on the held-out windows" in log


def test_the_best_of_a_future_that_was_taken_back_is_none(tmp_path, monkeypatch):
    watched(monkeypatch, {2: 3.0, 4: 1.0, 6: 2.0})
    root = tmp_path / "run" / "checkpoints"
    changes = {**BEST, "training.keep_last": 0}
    tiny_run(output=tmp_path / "run", stop_at_step=5, overrides=changes)
    watched(monkeypatch, {4: 2.5, 6: 2.75})
    tiny_run(
        output=tmp_path / "run", resume_from=root / "step-00000002", stop_at_step=7, overrides=BEST
    )
    assert steps_of(root) == [4, 7]


def test_a_checkpoint_that_is_found_to_be_the_best_by_the_resume_is_kept(tmp_path, monkeypatch):
    """The signal came before its evaluation, which the resume makes."""
    watched(monkeypatch, {2: 3.0, 4: 1.0})
    tiny_run(Interrupts(4), output=tmp_path / "run", overrides=BEST)
    tiny_run(output=tmp_path / "run", overrides=BEST, resume=True, stop_at_step=7)
    assert steps_of(tmp_path / "run" / "checkpoints") == [4, 7]
