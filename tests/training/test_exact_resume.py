"""Promise 4: n steps, SIGKILL, resume and m steps are n + m steps in one go, bit for bit."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_core import ConfigError, hookimpl
from apt_core.modeling.seeds import deterministic_kernels
from apt_core.testing import TINY_PROFILE, TinyRun, tiny_run
from apt_core.testing.tiny import TEXT

EPOCH = 5
"""Steps of an epoch: 48 windows in steps of 2 * 5, so the last step is short, and so is the last
window."""

SETTINGS = {
    "model.dropout": 0.2,
    "training.batch_size": 5,
    "training.grad_accum_steps": 2,
    "training.log_every_steps": 1,
    "training.keep_last": 0,
    "training.ema_decay": 0.9,
    "training.warmup_steps": 3,
    # So few evaluations are better by so much that their count goes up.
    "training.early_stopping_patience": 100,
    "training.early_stopping_min_delta": 1.0,
    "evaluation.eval_freq": 2,
    "evaluation.sample_tokens": 0,
    "schedules.enable_curriculum_at_step": 4,
    "schedules.curriculum_weight": {"start": 1e-3, "end": 1e-2, "by": "step"},
    "hardware.num_threads": 1,
}

CURRICULUM = """
import torch
from apt_core import SectionSpec, hookimpl

state = {"steps": 0, "mean": torch.zeros(256)}

@hookimpl
def apt_register_config():
    return [SectionSpec(schedule_params=["curriculum_weight"])]

@hookimpl
def apt_loss_terms(trainer, output):
    position = {"epoch": trainer.epoch, "step": trainer.step + 1, "tokens": trainer.tokens}
    weight = trainer.schedule.get_param("curriculum_weight", **position)
    noise = torch.randn(256, generator=trainer.rng("curriculum"))
    distance = output.logits.mean((0, 1)) - state["mean"] - state["steps"] - noise
    return {"distance": weight * distance.square().mean()}

@hookimpl
def on_backward_end(step, trainer):
    if step == 4:
        next(trainer.model.parameters()).grad.fill_(float("nan"))

@hookimpl
def on_step_end(step, loss, trainer):
    state["steps"] += 1
    state["mean"] += loss

@hookimpl
def apt_metrics(trainer):
    return {"steps": state["steps"], "newest": trainer.metrics.get("loss", 0.0)}

@hookimpl
def apt_state_dict(trainer):
    return state

@hookimpl
def apt_load_state_dict(trainer, state):
    globals()["state"] = state
"""


@dataclass
class Experiment:
    """One profile with the plugin, trained as often as asked in folders of its own."""

    folder: Path
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self.plugin = self.folder / "curriculum.py"
        self.plugin.write_text(CURRICULUM, encoding="utf-8")
        self.text = self.folder / "text.txt"
        self.text.write_text(TEXT, encoding="utf-8")

    def train(self, name: str, *plugins: Any, changes: Any = (), **options: Any) -> TinyRun:
        return tiny_run(
            str(self.plugin),
            *plugins,
            strict=False,
            profile={**TINY_PROFILE, "data": {"train_path": str(self.text)}},
            overrides={**SETTINGS, **self.settings, **dict(changes)},
            output=self.folder / name,
            **options,
        )


@pytest.fixture(scope="module", params=["adamw", "muon"])
def experiment(request, tmp_path_factory) -> Experiment:
    """With a run in one go in the folder ``whole``."""
    folder = tmp_path_factory.mktemp(request.param)
    made = Experiment(folder, {"training.optimizer_name": request.param})
    whole = made.train("whole")
    assert (whole.result.status, whole.result.step) == ("finished", 2 * EPOCH)
    assert whole.manifest["timeline"][0]["step"] == 4
    assert [row["skipped_steps"] for row in whole.metrics if "skipped_steps" in row][-1] == 1
    return made


KILLS = (2, EPOCH - 1, EPOCH, EPOCH + 1, 2 * EPOCH - 1)


def test_killed_inside_an_accumulation_window_and_resumed_is_in_one_go(
    experiment, in_children, differences, killer
):
    """After each of these steps, one after another."""
    saving = {"training.save_every_steps": 1}
    for n in KILLS:
        kill, again = killer(n), n > KILLS[0]
        part = partial(experiment.train, "killed", kill, changes=saving, resume=again)
        assert in_children(part) == [-signal.SIGKILL]
    resumed = experiment.train("killed", resume=True)
    log = (experiment.folder / "killed" / "log.txt").read_text(encoding="utf-8")
    assert all(f"(step {n})" in log for n in KILLS)
    assert resumed.result.step == 2 * EPOCH
    assert differences(experiment.folder / "whole", experiment.folder / "killed") == []


def test_killed_long_after_its_checkpoint_and_twice(experiment, in_children, differences, killer):
    """The steps between are taken again; the rows of them stand once."""
    for attempt, n in enumerate((5, 8)):
        kills = killer(n, saved=n - n % 3, micro=1)
        saving = {"training.save_every_steps": 3, "training.save_freq": 0}
        codes = in_children(
            lambda kills=kills, saving=saving, again=attempt > 0: experiment.train(
                "twice", kills, changes=saving, resume=again
            )
        )
        assert codes == [-signal.SIGKILL]
    experiment.train("twice", resume=True)
    assert differences(experiment.folder / "whole", experiment.folder / "twice") == []


def skipping(what: str) -> Callable[..., None]:
    from apt_core.runs.tensor_files import SavedTensors

    read = SavedTensors.read_into

    def read_into(self: Any, targets: Any, of: str) -> None:
        if of != what:
            read(self, targets, of)

    return read_into


def nothing(*arguments: Any) -> None:
    pass


def no_states(*arguments: Any) -> list[Any]:
    return []


READ = "apt_core.runs.tensor_files.SavedTensors.read_into"
BROKEN = {
    "model": (READ, lambda: skipping("model"), "model: "),
    "optimizer": ("apt_core.training.restoring.load_optimizer", lambda: nothing, "optimizer: "),
    "ema": (READ, lambda: skipping("average of the weights"), "ema: "),
    "guard": (
        "apt_core.training.step.finite_guard.FiniteGuard.load",
        lambda: nothing,
        "skipped_steps",
    ),
    "stopping": (
        "apt_core.training.stopping.Stopping.load",
        lambda: nothing,
        "the state: stopping",
    ),
    "plugins": ("apt_core.training.restoring.joined_states", lambda: no_states, "plugins: "),
    "dropout": ("apt_core.modeling.seeds.ModelSeeds.seed", lambda: nothing, "loss after"),
}


@pytest.mark.parametrize(
    ("experiment", "item"),
    [*(("adamw", item) for item in BROKEN), ("muon", "optimizer")],
    indirect=["experiment"],
)
def test_the_comparison_notices_a_state_item_that_is_not_restored(
    experiment, in_children, differences, killer, monkeypatch, item
):
    """The control of the tests above."""
    source = experiment.folder / "source"
    if not source.exists():
        saving = {"training.save_every_steps": 6}
        codes = in_children(lambda: experiment.train("source", killer(6), changes=saving))
        assert codes == [-signal.SIGKILL]
    copy = experiment.folder / f"broken-{item}"
    shutil.copytree(source, copy)
    place, make, expected = BROKEN[item]
    monkeypatch.setattr(place, make())
    experiment.train(copy.name, resume=True)
    found = differences(experiment.folder / "whole", copy)
    assert any(expected in difference for difference in found), found


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.long
def test_two_processes_that_are_killed_resume_exactly(
    tmp_path, in_children, differences, killer, ranks, sharding
):
    """48 windows in steps of 2 processes * 2 * 2: the last step of an epoch is whole."""
    settings = {"hardware.distributed": sharding, "training.batch_size": 2}
    made = Experiment(tmp_path, settings)
    assert in_children(*ranks(lambda: made.train("whole"))) == [0, 0]
    saving = {"training.save_every_steps": 1}
    killed = ranks(lambda: made.train("killed", killer(7), changes=saving))
    assert in_children(*killed) == [-signal.SIGKILL, -signal.SIGKILL]
    assert in_children(*ranks(lambda: made.train("killed", resume=True))) == [0, 0]
    assert "(step 7)" in (tmp_path / "killed" / "log.txt").read_text(encoding="utf-8")
    assert differences(tmp_path / "whole", tmp_path / "killed") == []


QUICK = {"evaluation.sample_tokens": 0, "hardware.num_threads": 1, "training.log_every_steps": 1}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_kernels_are_used_inside_and_put_back(wanted, before):
    class Looks:
        inside = None

        @hookimpl
        def on_step_end(self) -> None:
            self.inside = torch.are_deterministic_algorithms_enabled()

    looks = Looks()
    torch.use_deterministic_algorithms(before)
    try:
        tiny_run(looks, steps=1, overrides={**QUICK, "training.deterministic": wanted})
        assert looks.inside is (wanted or before)
        assert torch.are_deterministic_algorithms_enabled() is before
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_that_want_other_kernels_are_refused_and_the_last_puts_them_back():
    def in_a_thread(call, *arguments):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(call, *arguments).result()

    enabled = torch.are_deterministic_algorithms_enabled
    first, second = (ExitStack() for _ in range(2))
    first.enter_context(deterministic_kernels(True))
    with pytest.raises(ConfigError, match=r"training.deterministic: differs from th"):
        in_a_thread(deterministic_kernels(False).__enter__)
    with deterministic_kernels(False):  # a run within the run, which holds the thread up
        assert not enabled()
    assert enabled()
    in_a_thread(second.enter_context, deterministic_kernels(True))
    first.close()
    assert enabled()
    second.close()
    assert not enabled()


def test_they_are_put_back_after_a_run_that_fails():
    class Fails:
        @hookimpl
        def on_step_end(self) -> None:
            raise ValueError("boom")

    with pytest.raises(Exception, match="boom"):
        tiny_run(Fails(), steps=1, overrides={**QUICK, "training.deterministic": True})
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_seed_decides_about_everything_that_is_drawn():
    settings = {**QUICK, "model.dropout": 0.3}
    first, same, other = (
        tiny_run(steps=3, overrides={**settings, "training.seed": seed}) for seed in (1, 1, 2)
    )
    assert first.same_weights(same)
    assert [row.get("loss") for row in first.metrics] == [row.get("loss") for row in same.metrics]
    assert not first.same_weights(other)
