"""A run whose weights or losses are not finite fails, keeps what was good, and says a way back."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apt_core import hookimpl
from apt_core.cli.run_command import run_command
from apt_core.cli.train import app
from apt_core.errors import CheckpointError, ConfigError, DivergedError, TrainingError
from apt_core.evaluation.quick_eval import BatchScore, summarize
from apt_core.runs import checkpoint
from apt_core.testing import tiny_run
from apt_core.training.evaluating import Evaluation, Evaluator

NAN, INF = float("nan"), float("inf")
QUIET = {
    "training.log_every_steps": 1,
    "training.save_freq": 0,
    "evaluation.eval_freq": 0,
    "evaluation.sample_tokens": 0,
    "hardware.num_threads": 1,
}


def steps_of(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run / "checkpoints")]


class BadGradient:
    """An entry of one gradient is no number in some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    @hookimpl
    def on_backward_end(self, step: int, trainer: Any) -> None:
        if step in self.steps:
            next(trainer.model.parameters()).grad[0, 0] = NAN


OVERSHOOTS = """
import torch
from apt_core import hookimpl

@hookimpl
def on_step_end(step, trainer):
    if step == 6 and trainer.config.training.learning_rate > 7e-4:
        with torch.no_grad():
            trainer.model.blocks[0].ffn.down.weight.mul_(float("inf"))
"""


def test_weights_that_are_not_finite_are_not_saved_and_the_way_back_leads_on(
    apt_train, tmp_path, capsys
):
    """The rate of the tiny profile is 1e-3; half of it is what the command has."""
    plugin = tmp_path / "overshoots.py"
    plugin.write_text(OVERSHOOTS, encoding="utf-8")
    saving = ("--training.save_every_steps", "4", "--training.keep_last", "1")
    run = apt_train("--plugin", str(plugin), *saving)
    assert run.code == 1 and run.manifest["status"] == "failed"
    assert "the weights after step 8 are not finite (blocks.0.ffn.down.weight)" in run.err
    assert steps_of(run.folder) == [4]
    (line,) = [line for line in run.err.splitlines() if line.startswith("to go back: ")]
    words = shlex.split(line.removeprefix("to go back: "))
    assert words[0] == "apt-train"
    assert run_command(app, "apt-train", words[1:]) == 0, capsys.readouterr().err
    assert run.manifest["status"] == "finished"
    (change,) = run.manifest["changes"]
    assert change == {"key": "training.learning_rate", "step": 4, "before": 1e-3, "after": 5e-4}


@pytest.mark.parametrize("what", ["ema", "average"])
def test_an_average_that_is_not_finite_is_not_saved(tmp_path, what):
    class Spoils:
        @hookimpl
        def on_step_end(self, step: int, trainer: Any) -> None:
            average = (
                trainer.trained.averages.ema if what == "ema" else trainer.average("spoils", 0.5)
            )
            if step == 5:
                next(iter(average.values.values()))[0] = NAN

    changes = {**QUIET, "training.ema_decay": 0.9, "training.save_every_steps": 2}
    with pytest.raises(DivergedError, match=r"average of .*step 4, the newest"):
        tiny_run(Spoils(), overrides=changes, output=tmp_path / "run")
    assert steps_of(tmp_path / "run") == [2, 4]


def test_two_processes_fail_together_over_the_weights_of_one(tmp_path, in_children, ranks):
    class Spoils:
        @hookimpl
        def on_step_end(self, step: int, trainer: Any) -> None:
            if step == 3 and trainer.rank == 1:
                with torch.no_grad():
                    trainer.model.embedding.weight.fill_(INF)

    changes = {**QUIET, "training.batch_size": 2, "training.save_every_steps": 3}
    train = ranks(lambda: tiny_run(Spoils(), overrides=changes, output=tmp_path / "run"))
    assert in_children(*train) == [1, 1]
    assert steps_of(tmp_path / "run") == []
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert "the weights after step 3 are not finite" in manifest["error"]


def test_steps_that_are_not_finite_rotate_nothing_out(tmp_path):
    """Of the checkpoints of the streak there is but the newest, and it counts for none."""
    changes = {**QUIET, "training.save_every_steps": 2, "training.keep_last": 2}
    folder = tmp_path / "run"
    with pytest.raises(DivergedError, match=r"10 steps in a row.*go back to step 6.*step-00000006"):
        tiny_run(BadGradient(*range(7, 99)), overrides=changes, output=folder)
    assert steps_of(folder) == [4, 6, 16]
    run = tiny_run(overrides=changes, output=folder, resume=True, stop_at_step=18)
    assert run.result.step == 18
    assert steps_of(folder) == [6, 18]
    tiny_run(overrides=changes, output=folder, resume=True, stop_at_step=20)
    assert steps_of(folder) == [18, 20]


def test_a_single_bad_step_at_a_save_costs_no_checkpoint(tmp_path):
    changes = {**QUIET, "training.save_every_steps": 2, "training.keep_last": 1}
    run = tiny_run(BadGradient(4), overrides=changes, output=tmp_path / "run", stop_at_step=5)
    assert run.result.status == "stopped"
    assert steps_of(tmp_path / "run") == [5]


@pytest.mark.parametrize(("bad", "fails"), [((11, 12), True), ((12,), False), ((10, 11), False)])
def test_a_run_that_ends_in_a_streak_has_failed(tmp_path, bad, fails):
    folder = tmp_path / "run"
    train = {"steps": 12, "overrides": QUIET, "output": folder}
    if fails:
        with pytest.raises(DivergedError, match=r"ended in 2 steps in a row.*the last one step 12"):
            tiny_run(BadGradient(*bad), **train)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["status"] == "failed"
        assert manifest["figures"]["skipped_steps"] == 2 and manifest["figures"]["val_loss"] > 0
    else:
        assert tiny_run(BadGradient(*bad), **train).result.status == "finished"
    assert steps_of(folder) == [12]


@pytest.mark.parametrize("loss", [NAN, INF])
@pytest.mark.parametrize("stop", [None, 7])
def test_a_held_out_loss_that_is_not_finite_at_the_end_is_a_failure(
    tmp_path, monkeypatch, loss, stop
):
    """However the run ends; the checkpoint of such a loss counts for none either."""
    evaluate = Evaluator.evaluate

    def scripted(self: Evaluator, *, everything: bool) -> Evaluation | None:
        found = evaluate(self, everything=everything)
        if found is None or self._kernel.manager.step < 7:
            return found
        return Evaluation({**found.scores, "val_loss": loss}, loss)

    monkeypatch.setattr(Evaluator, "evaluate", scripted)
    folder = tmp_path / "run"
    changes = {**QUIET, "training.save_every_steps": 3, "training.keep_last": 1}
    with pytest.raises(DivergedError, match=rf"is {loss} after step .*go back to step 6"):
        tiny_run(overrides=changes, output=folder, steps=8, stop_at_step=stop)
    assert steps_of(folder) == [6, stop or 8]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["status"], manifest["figures"]["val_loss"]) == ("failed", str(loss))


@pytest.mark.parametrize(("loss", "perplexity"), [(NAN, NAN), (INF, INF), (800.0, INF), (0.0, 1.0)])
def test_the_perplexity_is_the_exponential_of_the_loss(loss, perplexity):
    found = summarize([BatchScore(loss, None, 1)], 1.0)["val_ppl"]
    assert found == perplexity or (math.isnan(found) and math.isnan(perplexity))


def test_a_checkpoint_with_weights_that_are_not_finite_is_refused(tmp_path, vouch):
    """One that another program, or an earlier version, has written."""
    tiny_run(overrides=QUIET, output=tmp_path / "run", stop_at_step=3)
    (path,) = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    weights = load_file(path / "model.safetensors")
    weights["embedding.weight"][0, 0] = NAN
    save_file(weights, path / "model.safetensors")
    digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    vouch(path, {"model.safetensors": digest})
    with pytest.raises(CheckpointError, match=r"not finite \(embedding\.weight\)"):
        tiny_run(overrides=QUIET, output=tmp_path / "run", resume=True)


# A resume with another rate -------------------------------------------------------------------


def test_a_rate_may_change_from_a_step_on_where_the_resume_is_told_to(tmp_path):
    folder, rate = tmp_path / "run", "training.learning_rate"
    constant = {**QUIET, "training.lr_schedule_name": "constant", "training.warmup_steps": 0}
    changed = {**constant, rate: 5e-4, "training.gradient_clip": 0.1}
    tiny_run(overrides=constant, output=folder, stop_at_step=3)
    with pytest.raises(ConfigError, match=f"{rate}.*--allow-change {rate}") as refused:
        tiny_run(overrides=changed, output=folder, resume=True)
    assert len(refused.value.problems) == 2
    with pytest.raises(ConfigError, match=r"--allow-change training\.seed: a resume may not"):
        tiny_run(overrides=constant, output=folder, resume=True, allow_change=["training.seed"])
    allowed = [rate, "training.gradient_clip", "training.muon.learning_rate"]
    run = tiny_run(
        overrides=changed, output=folder, resume=True, allow_change=allowed, stop_at_step=5
    )
    rows = [row["lr"] for row in run.metrics if "loss" in row]
    assert rows == [1e-3] * 3 + [5e-4] * 2
    assert [change["key"] for change in run.manifest["changes"]] == allowed[:2]
    log = (folder / "log.txt").read_text(encoding="utf-8")
    assert f"{rate}: 0.001 up to step 3, 0.0005 from there on" in log
    assert "--allow-change training.muon.learning_rate: it is what it was" in log
    # What it was told once is in its checkpoints.
    run = tiny_run(overrides=changed, output=folder, resume=True, stop_at_step=6)
    assert len(run.manifest["changes"]) == 2


def test_a_change_without_a_resume_is_bad_input(apt_train):
    run = apt_train("--allow-change", "training.learning_rate")
    assert run.code == 2 and "--allow-change goes with --resume" in run.err


def test_a_term_at_the_end_is_named_in_place_of_the_rate(tmp_path):
    class Term:
        @hookimpl
        def apt_loss_terms(self, trainer, output):
            return {"wild": output.logits.mean() * (float("inf") if trainer.step > 4 else 0.0)}

    with pytest.raises(TrainingError, match=r"run ended in .*loss/term\.wild.*mend the plugin"):
        tiny_run(Term(), steps=8, output=tmp_path / "run")
