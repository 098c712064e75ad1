"""Where a run ends, where it stops, and which limits a resume may change."""

from __future__ import annotations

import functools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apt_core import hookimpl
from apt_core.errors import ConfigError
from apt_core.parallel.world import World
from apt_core.runs import checkpoint
from apt_core.testing import TinyRun, tiny_run
from apt_core.training.evaluating import Evaluation, Evaluator
from apt_core.training.restoring import Restoring

QUIET = {
    "training.log_every_steps": 1,
    "evaluation.eval_freq": 0,
    "evaluation.sample_tokens": 0,
    "hardware.num_threads": 1,
}
STEP = 4 * 16
"""Target tokens of a whole step of the tiny profile: 12 of them make an epoch of 766 tokens."""
CONSTANT = {**QUIET, "training.lr_schedule_name": "constant"}


def trained(run: Any) -> list[dict[str, Any]]:
    return [row for row in run.metrics if "loss" in row]


# max_steps, max_tokens, max_seconds, --stop-at-step ------------------------------------------


def test_max_steps_ends_the_run_and_its_schedule():
    run = tiny_run(overrides={**QUIET, "training.max_steps": 5})
    assert (run.result.status, run.result.step) == ("finished", 5)
    assert trained(run)[-1]["lr"] < trained(run)[0]["lr"] / 10


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (3 * STEP, 3), (3 * STEP + 1, 4)])
def test_max_tokens_ends_with_the_step_that_reaches_it(tokens, steps):
    run = tiny_run(overrides={**QUIET, "training.max_tokens": tokens})
    assert run.result.step == steps
    assert run.result.tokens >= tokens > run.result.tokens - STEP


def test_max_tokens_may_be_more_than_an_epoch():
    run = tiny_run(overrides={**QUIET, "training.max_tokens": 768 + 2 * STEP})
    assert (run.result.epoch, run.result.step) == (2, 14)
    assert run.result.tokens == 768 + 2 * STEP


def test_the_rate_decays_to_the_step_that_reaches_max_tokens():
    by_tokens = tiny_run(overrides={**QUIET, "training.max_tokens": 5 * STEP})
    by_steps = tiny_run(overrides={**QUIET, "training.max_steps": 5})
    assert [row["lr"] for row in trained(by_tokens)] == [row["lr"] for row in trained(by_steps)]
    assert by_tokens.same_weights(by_steps)


def test_max_seconds_stops_with_a_checkpoint_and_a_resume_has_as_much_again(tmp_path, monkeypatch):
    """Every look at the clock is one second later."""

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            self.now += 1.0
            return self.now

    monkeypatch.setattr("apt_core.training.stopping.time", Clock())
    changes = {**QUIET, "training.max_seconds": 4.5}
    first = tiny_run(output=tmp_path / "run", overrides=changes)
    assert (first.result.status, first.result.step) == ("stopped", 5)
    assert "training.max_seconds" in first.result.reason
    assert (tmp_path / "run" / "checkpoints" / "step-00000005").is_dir()
    second = tiny_run(output=tmp_path / "run", overrides=changes, resume=True)
    # A resume looks once before its first step.
    assert second.result.step == 9


def test_stop_at_step_leaves_the_schedule_as_it_is(tmp_path):
    whole = tiny_run(overrides=QUIET)
    run = tiny_run(output=tmp_path / "run", overrides=QUIET, stop_at_step=5)
    assert (run.result.status, run.result.step) == ("stopped", 5)
    rows = trained(whole)
    assert [row["lr"] for row in trained(run)] == [row["lr"] for row in rows[:5]]
    run = tiny_run(output=tmp_path / "run", overrides=QUIET, resume=True)
    assert run.result.status == "finished"
    assert run.same_weights(whole)
    assert [row["loss"] for row in trained(run)] == [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, Path]:
    """A run that was stopped after five steps, and its folder."""
    folder = tmp_path_factory.mktemp("five") / "run"
    return tiny_run(output=folder, overrides=CONSTANT, stop_at_step=5), folder


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"stop_at_step": 5}),
        ({}, {"stop_at_step": 3}),
        ({"training.max_tokens": 5 * STEP}, {}),
        ({"training.max_tokens": 2 * STEP}, {}),
        ({"training.max_steps": 5}, {}),
        ({"training.max_steps": 4}, {}),
    ],
)
def test_a_limit_that_is_reached_already_lets_a_resume_take_no_step(
    five, tmp_path, changes, options
):
    first, folder = five
    shutil.copy(folder.with_name("run.txt"), tmp_path / "run.txt")
    shutil.copytree(folder, tmp_path / "run")
    again = tiny_run(
        output=tmp_path / "run", overrides={**CONSTANT, **changes}, resume=True, **options
    )
    assert again.result.step == 5
    assert again.metrics == first.metrics


# Early stopping ------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch):
    """Let the watched loss after a step be the one given."""

    def script(losses: dict[int, float]) -> None:
        def scripted(self: Evaluator, *, everything: bool) -> Evaluation | None:
            found = evaluate(self, everything=everything)
            if found is None:
                return None  # told to stop meanwhile
            return Evaluation(found.scores, losses.get(self._kernel.manager.step, 9.0))

        monkeypatch.setattr(Evaluator, "evaluate", scripted)

    evaluate = Evaluator.evaluate
    return script


def patient(patience: int, **more: Any) -> dict[str, Any]:
    changes = {"evaluation.eval_freq": 2, "training.early_stopping_patience": patience}
    return {**QUIET, **changes, **more}


@pytest.mark.parametrize(
    ("losses", "patience", "step"),
    [
        ({2: 3.0, 4: 3.0}, 1, 4),
        ({2: 3.0, 4: 2.0, 6: 2.5, 8: 2.4}, 2, 8),
        ({2: 3.0, 4: 3.5, 6: 2.9, 8: 3.5, 10: 3.5}, 2, 10),
        ({2: 3.0, 4: float("nan"), 6: float("nan")}, 2, 6),
        ({2: float("nan"), 4: 3.0, 6: 2.0, 8: 1.0, 10: 0.5}, 2, 14),
    ],
    ids=["at once", "after two", "a better one begins anew", "nan", "nan first"],
)
def test_it_stops_after_so_many_evaluations_without_a_better_loss(watched, losses, patience, step):
    """Epochs end at 12 and 24, with an evaluation each."""
    watched(losses)
    run = tiny_run(overrides=patient(patience))
    assert (run.result.status, run.result.step) == ("stopped", step)
    assert f"no better validation loss in {patience} evaluations" in run.result.reason


@pytest.mark.parametrize(("delta", "step"), [(0.0, 24), (0.05, 24), (0.2, 6)])
def test_a_loss_must_be_better_by_min_delta(watched, delta, step):
    watched({step: 3.0 - 0.05 * step for step in range(0, 25)})
    changes = patient(2, **{"training.early_stopping_min_delta": delta})
    assert tiny_run(overrides=changes).result.step == step


def test_small_gains_add_up(watched):
    """They are measured against the last loss that was better by enough."""
    watched({step: 3.0 - 0.05 * step for step in range(0, 25)})
    changes = patient(3, **{"training.early_stopping_min_delta": 0.15})
    assert tiny_run(overrides=changes).result.status == "finished"


def test_patience_goes_on_where_a_resume_does(watched, tmp_path):
    watched({2: 3.0})
    whole = tiny_run(overrides=patient(4), output=tmp_path / "whole")
    tiny_run(overrides=patient(4), output=tmp_path / "parts", stop_at_step=7)
    parts = tiny_run(overrides=patient(4), output=tmp_path / "parts", resume=True)
    assert whole.result.step == parts.result.step == 10
    assert whole.same_weights(parts)


CUTS: list[dict[str, Any]] = [
    {"training.batch_size": 1, "training.grad_accum_steps": 4},
    {"training.batch_size": 2, "training.grad_accum_steps": 2, "evaluation.metrics": ["accuracy"]},
]


@pytest.mark.parametrize("cut", CUTS, ids=["1x4", "2x2"])
def test_a_resume_that_cuts_the_batch_another_way_is_judged_on_the_same_windows(tmp_path, cut):
    """6 windows are held out, of which an evaluation watches the 4 of a step."""
    changes = patient(2, **{"evaluation.eval_batches": 1, "evaluation.save_best": True})
    whole = tiny_run(overrides=changes, output=tmp_path / "whole")
    tiny_run(overrides=changes, output=tmp_path / "parts", stop_at_step=5)
    parts = tiny_run(overrides={**changes, **cut}, output=tmp_path / "parts", resume=True)
    watched = [
        [(row["step"], row["val_tokens"]) for row in run.metrics if "val_loss" in row]
        for run in (whole, parts)
    ]
    assert set(watched[0]) <= set(watched[1])
    assert "begin anew" not in (tmp_path / "parts" / "log.txt").read_text(encoding="utf-8")
    for one, other in zip(evaluations(whole), evaluations(parts), strict=False):
        # Adam turns the rounding of small gradients into steps; other windows differ by percents.
        assert other == pytest.approx(one, rel=1e-4)


def evaluations(run: Any) -> list[float]:
    return [row["val_loss"] for row in run.metrics if "val_loss" in row and row["step"] != 5]


def test_other_windows_begin_the_judgement_anew(watched, tmp_path):
    """Patience would be at its end after step 6."""
    watched({2: 1.0})
    changes = patient(2, **{"evaluation.eval_batches": 1})
    tiny_run(overrides=changes, output=tmp_path / "run", stop_at_step=5)
    changes = patient(2, **{"evaluation.eval_batches": 2})
    run = tiny_run(overrides=changes, output=tmp_path / "run", resume=True)
    assert run.result.step == 10
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert "evaluations watch other held-out windows than before" in log


def test_a_last_evaluation_does_not_try_the_patience(watched, tmp_path):
    """The run in one go would not have made it."""
    watched({2: 3.0, 3: 1.0, 4: 2.0})
    whole = tiny_run(overrides=patient(2), output=tmp_path / "whole")
    for stop in (3, 5):
        tiny_run(
            overrides=patient(2), output=tmp_path / "parts", stop_at_step=stop, resume=stop > 3
        )
    parts = tiny_run(overrides=patient(2), output=tmp_path / "parts", resume=True)
    assert whole.result.step == parts.result.step == 8


def test_a_run_that_stopped_early_stays_so_until_its_patience_is_raised(watched, tmp_path):
    watched({2: 3.0})
    first = tiny_run(overrides=patient(2), output=tmp_path / "run")
    assert first.result.step == 6
    again = tiny_run(overrides=patient(2), output=tmp_path / "run", resume=True)
    assert (again.result.status, again.result.step) == ("stopped", 6)
    more = tiny_run(overrides=patient(3), output=tmp_path / "run", resume=True)
    assert more.result.step == 8


def test_an_evaluation_that_a_signal_kept_from_being_made_is_made_by_the_resume(tmp_path):
    """So that rows, patience and the best checkpoint are those of a run in one go."""

    class Interrupts:
        @hookimpl
        def on_step_end(self, step: int) -> None:
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = tiny_run(overrides=patient(50), output=tmp_path / "whole")
    first = tiny_run(Interrupts(), overrides=patient(50), output=tmp_path / "parts")
    assert (first.result.status, first.result.exit_code) == ("interrupted", 143)
    parts = tiny_run(overrides=patient(50), output=tmp_path / "parts", resume=True)
    evaluated = [
        [(row["step"], row["val_loss"]) for row in run.metrics if "val_loss" in row]
        for run in (whole, parts)
    ]
    assert evaluated[0] == evaluated[1]
    assert 4 in dict(evaluated[0])


class KillsInEvaluation:
    """Ends the process as one that has been told its limit is, in the first evaluation from
    ``step`` on, or when its row is written; asks for a stop there, if so told."""

    def __init__(self, step: int, *, asks: bool = False, late: bool = False) -> None:
        self.step, self.asks, self.late = step, asks, late

    @hookimpl
    def on_step_end(self, step: int, trainer: Any) -> None:
        if self.asks and step == self.step:
            trainer.request_stop("enough")

    @hookimpl
    def on_evaluation_start(self, trainer: Any) -> None:
        if trainer.step >= self.step and not self.late:
            os.kill(os.getpid(), signal.SIGKILL)

    @hookimpl
    def on_evaluation_end(self, trainer: Any) -> None:
        if trainer.step >= self.step and self.late:
            os.kill(os.getpid(), signal.SIGKILL)


JUDGED = patient(50, **{"training.save_freq": 0})


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyRun]:
    """A run in one go, and its folder."""
    folder = tmp_path_factory.mktemp("judged") / "whole"
    return folder, tiny_run(overrides=JUDGED, output=folder)


@pytest.mark.parametrize(
    ("step", "how"),
    [
        (5, {"stop_at_step": 5}),  # within an epoch
        (6, {"stop_at_step": 6}),  # where an evaluation is due
        (12, {"stop_at_step": 12}),  # at the end of an epoch
        (12, {"asks": True}),
        (12, {"stop_at_step": 12, "late": True}),
        (6, {"stop_at_step": 6, "late": True}),
        (24, {}),  # at the end of the run
        (24, {"late": True}),
    ],
)
def test_a_run_that_is_killed_in_its_last_evaluation_has_a_checkpoint(
    judged, tmp_path, in_children, differences, step, how
):
    """And the resume gives the bits and rows of a run in one go."""
    told = {key: value for key, value in how.items() if key != "stop_at_step"}
    stop = how.get("stop_at_step")
    train = functools.partial(tiny_run, overrides=JUDGED, output=tmp_path / "parts")
    killed = in_children(lambda: train(KillsInEvaluation(step, **told), stop_at_step=stop))
    assert killed == [-signal.SIGKILL]
    found = checkpoint.newest_intact(tmp_path / "parts" / "checkpoints")
    assert found.state.step == step
    assert train(resume=True).result.status == "finished"
    assert differences(judged[0], tmp_path / "parts") == []


@pytest.mark.parametrize("step", [5, 6, 12])
def test_rows_of_evaluations_stand_once_after_a_stop(judged, tmp_path, step):
    """But for that which the stop alone had asked for, in step 5."""
    whole = judged[1]
    first = tiny_run(overrides=JUDGED, output=tmp_path / "parts", stop_at_step=step)
    assert first.result.figures["val_loss"] > 0
    parts = tiny_run(overrides=JUDGED, output=tmp_path / "parts", resume=True)
    rows = [
        [(row["step"], row["val_loss"]) for row in run.metrics if "val_loss" in row]
        for run in (whole, parts)
    ]
    assert [row for row in rows[1] if row[0] != 5] == rows[0]
    assert whole.same_weights(parts)


def test_two_processes_save_before_they_evaluate(tmp_path, in_children, ranks):
    def train() -> None:
        tiny_run(
            KillsInEvaluation(6),
            overrides=patient(50, **{"training.batch_size": 2}),
            output=tmp_path / "run",
            stop_at_step=6,
        )

    assert in_children(*ranks(train)) == [-signal.SIGKILL, -signal.SIGKILL]
    found = checkpoint.newest_intact(tmp_path / "run" / "checkpoints")
    assert found.state.step == 6


# What a resume may change --------------------------------------------------------------------

LONGER = {
    "training.max_steps": 9,
    "training.max_epochs": 3,
    "training.max_tokens": 9 * STEP,
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """The folder of a run with these settings that was stopped after three steps."""
    made: dict[str, Path] = {}

    def get(changes: dict[str, Any]) -> Path:
        folder = made.get(str(changes))
        if folder is None:
            folder = made[str(changes)] = tmp_path_factory.mktemp("stopped") / "run"
            tiny_run(output=folder, overrides={**QUIET, **changes}, stop_at_step=3)
        return folder

    return get


@pytest.fixture
def resumed(stopped, tmp_path):
    """Train three steps, and resume with other settings."""

    def resume(before: dict[str, Any], after: dict[str, Any], **options: Any) -> Any:
        folder = stopped(before)
        shutil.copy(folder.with_name("run.txt"), tmp_path / "run.txt")
        shutil.copytree(folder, tmp_path / "run")
        return tiny_run(
            output=tmp_path / "run", overrides={**QUIET, **before, **after}, resume=True, **options
        )

    return resume


@pytest.mark.parametrize("key", LONGER)
def test_a_constant_rate_allows_another_length(resumed, key):
    constant = {"training.lr_schedule_name": "constant", "training.warmup_steps": 2}
    run = resumed(constant, {key: LONGER[key]}, stop_at_step=9)
    assert run.same_weights(
        tiny_run(overrides={**QUIET, **constant, key: LONGER[key]}, stop_at_step=9)
    )


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("key", LONGER)
def test_a_rate_that_decays_refuses_another_length(resumed, key, name):
    with pytest.raises(ConfigError, match=rf"{key}.*the learning rate of step"):
        resumed({"training.lr_schedule_name": name}, {key: LONGER[key]})


FREE = {
    "training.max_seconds": 1e6, "training.early_stopping_patience": 9, "training.save_freq": 0,
    "training.save_every_steps": 5, "training.keep_last": 7, "training.log_every_steps": 3,
    "training.max_nonfinite_steps": 2, "evaluation.eval_freq": 3, "evaluation.save_best": True,
    "debug.check_gradients": True, "description": "another",
}  # fmt: skip
FIXED = {
    "model.dropout": 0.1, "model.d_ff": 64, "training.learning_rate": 0.1,
    "training.weight_decay": 0.5, "training.seed": 1, "training.warmup_steps": 1,
    "training.gradient_clip": 0.5, "training.ema_decay": 0.5, "training.optimizer_name": "muon",
    "training.deterministic": True, "training.betas": [0.8, 0.9], "data.max_length": 8,
}  # fmt: skip


def test_what_does_not_change_the_weights_may_change(resumed):
    run = resumed({}, FREE, stop_at_step=5)
    assert run.same_weights(tiny_run(overrides=QUIET, stop_at_step=5))


def test_everything_that_changes_the_weights_is_refused_by_name_at_once(resumed):
    with pytest.raises(ConfigError) as refused:
        resumed({}, {**FREE, **FIXED})
    assert {problem.key for problem in refused.value.problems} == FIXED.keys()


def test_the_batch_may_be_cut_another_way(resumed):
    """4 * 1 = 2 * 2 windows a step: the position is the same one."""
    run = resumed({}, {"training.batch_size": 2, "training.grad_accum_steps": 2}, stop_at_step=5)
    whole = tiny_run(overrides=QUIET, stop_at_step=5)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(run.weights[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("batch_size", "hint"),
    [(2, "--training.grad_accum_steps 2 makes it 4"), (3, "training.grad_accum_steps for 4")],
)
def test_a_step_of_another_size_is_refused_with_what_would_fit(resumed, batch_size, hint):
    with pytest.raises(ConfigError, match=f"took 4 when .*{hint}") as refused:
        resumed({}, {"training.batch_size": batch_size})
    assert "training.batch_size" in str(refused.value)


def test_the_hint_counts_processes(resumed, monkeypatch):
    """Two processes with half the batch each make the step what it was."""
    parts = SimpleNamespace(plan=SimpleNamespace(windows_per_step=4))
    config = SimpleNamespace(training=SimpleNamespace(batch_size=2))
    run: Any = SimpleNamespace(
        _run=SimpleNamespace(parts=parts, world=World(size=2), config=config)
    )
    Restoring._check_global_batch(run, 4)
    with pytest.raises(ConfigError, match="grad_accum_steps 4 makes it 16"):
        Restoring._check_global_batch(run, 16)
