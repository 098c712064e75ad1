"""The figures that a run ends with: each says of which step it is, and whether it is of the whole
run or of what came since a resume."""

from __future__ import annotations

import logging
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from apt_core import hookimpl
from apt_core.runs import checkpoint
from apt_core.testing import TinyRun, tiny_run
from apt_core.training.summary import summary_lines

EPOCH = 12
"""Steps of an epoch of the tiny profile."""

QUIET = {
    "training.log_every_steps": 1,
    "evaluation.eval_freq": 0,
    "evaluation.sample_tokens": 0,
    "hardware.num_threads": 1,
}


class Interrupts:
    """Is told to stop in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @hookimpl
    def on_step_end(self, step: int) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def summary(run: TinyRun) -> str:
    kernel: Any = type("Kernel", (), {"registry": run.manager, "manager": run.manager})
    kernel.registry = type("Registry", (), {"resolutions": {}})
    return "\n".join(summary_lines(run.result, kernel))


def test_losses_of_an_interrupted_run_come_with_their_step(tmp_path: Path) -> None:
    changes = {**QUIET, "training.log_every_steps": 4}
    run = tiny_run(Interrupts(EPOCH + 3), overrides=changes, output=tmp_path / "run")
    figures = run.result.figures
    assert run.result.step == figures["steps"] == EPOCH + 3
    assert (figures["loss_step"], figures["val_step"]) == (EPOCH, EPOCH)
    rows = {row["step"]: row for row in run.metrics if "loss" in row}
    assert figures["loss"] == rows[EPOCH]["loss"]
    assert f"held-out text after step {EPOCH}: loss" in summary(run)
    assert summary(run).endswith(f"\ntalk to it: apt-chat {tmp_path / 'run'}")
    whole = tiny_run(overrides={**changes, "evaluation.eval_batches": 1}, steps=5)
    assert (whole.result.figures["loss_step"], whole.result.figures["val_step"]) == (5, 5)
    told = summary(whole)
    assert "held-out text: loss" in told
    counts = [whole.result.figures[name] for name in ("val_tokens_start", "val_tokens")]
    assert f"(at the start, on {counts[0]:,} tokens: " in told
    assert f", on {counts[1]:,} tokens\n" in told and counts[0] < counts[1]
    assert "since the resume" not in summary(whole)


def test_a_long_evaluation_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("apt_core.training.evaluating.LOG_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    tiny_run(overrides=QUIET, steps=1)
    said = r"evaluating on held-out text: \d+% of [0-9,]+ sequences, \d+:\d\d left"
    lines = [line for line in caplog.messages if line.startswith("evaluating on")]
    assert lines and all(re.fullmatch(said, line) for line in lines)
    caplog.clear()
    monkeypatch.setattr("apt_core.training.evaluating.LOG_SECONDS", 1e9)
    tiny_run(overrides=QUIET, steps=1)
    assert "evaluating on" not in caplog.text


def test_the_loss_that_is_told_at_an_epochs_end_says_its_step(tmp_path: Path) -> None:
    told = {5: r"loss=\d\.\d{3} \(step 10\)  ", 6: r"loss=\d\.\d{3}  ", 1000: ""}
    for every, said in told.items():
        folder = tmp_path / f"every{every}"
        changes = {**QUIET, "training.log_every_steps": every}
        tiny_run(overrides=changes, output=folder, stop_at_step=EPOCH)
        (line,) = [x for x in (folder / "log.txt").read_text().splitlines() if "Epoch 1/" in x]
        held_out = r"held out: loss=\d\.\d{3} ppl=\S+ bits/byte=[0-9.]+ on [0-9,]+ tokens"
        assert re.search(rf"Epoch 1/\d+: {said}{held_out}$", line), line


def test_scores_that_hooks_see_say_their_step() -> None:
    class Looks:
        @hookimpl
        def on_step_end(self, step: int, trainer: Any) -> None:
            if step == 5:
                self.seen = dict(trainer.metrics)

    looks = Looks()
    changes = {**QUIET, "evaluation.eval_freq": 3, "training.log_every_steps": 2}
    tiny_run(looks, steps=5, overrides=changes)
    assert looks.seen["step"] == 4 and "val_step" not in looks.seen
    tiny_run(looks, steps=5, overrides={**changes, "training.log_every_steps": 10})
    assert looks.seen["val_step"] == 3


def test_figures_of_a_resumed_run_are_of_the_whole_and_of_the_part(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tiny_run(overrides=QUIET, output=folder, stop_at_step=5)
    spent = checkpoint.newest_intact(folder / "checkpoints").state.spent
    run = tiny_run(overrides=QUIET, output=folder, resume=True, stop_at_step=8)
    figures = run.result.figures
    tokens = {row["step"]: row["tokens"] for row in run.metrics}
    since = tokens[8] - tokens[5]
    assert spent["training_tokens"] == tokens[5]
    assert (figures["steps"], figures["tokens"]) == (8, tokens[8])
    assert (figures["part_steps"], figures["part_tokens"]) == (3, since)
    whole, part = figures["seconds"], figures["part_seconds"]
    assert whole == pytest.approx(spent["seconds"] + part, abs=0.02)
    took = spent["training_seconds"] + since / figures["part_tokens_per_s"]
    assert figures["tokens_per_s"] == pytest.approx(tokens[8] / took, rel=1e-3)
    assert f"8 steps, {tokens[8]} tokens in 0:0" in summary(run)
    assert f"(since the resume: 3 steps, {since} tokens in 0:0" in summary(run)


@pytest.mark.parametrize("ends", [EPOCH, 7], ids=["an epoch's end", "within an epoch"])
def test_a_resume_of_what_is_finished_keeps_its_figures(tmp_path: Path, ends: int) -> None:
    """Its sample too, unless another one is asked for."""
    changes = {**QUIET, "evaluation.sample_tokens": 6, "training.max_steps": ends}
    first = tiny_run(overrides=changes, output=tmp_path / "run")
    assert first.result.status == "finished" and first.result.sample
    before = first.manifest["figures"]
    again = [{}, {"evaluation.sample_tokens": 0}, {}]
    for more in again:
        run = tiny_run(overrides={**changes, **more}, output=tmp_path / "run", resume=True)
        figures = run.manifest["figures"]
        assert str({n: figures[n] for n in before}) == str(before)  # a count stays whole
        assert (figures["part_steps"], figures["part_tokens"]) == (0, 0)
        assert run.manifest["sample"] == first.result.sample
        assert run.metrics == first.metrics
    other = {**changes, "evaluation.sample_prompt": "b"}
    run = tiny_run(overrides=other, output=tmp_path / "run", resume=True)
    assert run.manifest["sample"] == run.result.sample != ""
