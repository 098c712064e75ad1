"""Numbers that would undo the weights are judged where they are handed over, and weights that are
not finite are never saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, field_validator

from apt_core import ConfigError, ProviderSpec, SectionSpec, StopTraining, hookimpl
from apt_core.errors import ProviderError, TrainingError
from apt_core.runs import checkpoint
from apt_core.testing import TinyRun, tiny_run

SAVING = {"training.save_every_steps": 1, "training.log_every_steps": 1}
WILD = {
    "NaN": float("nan"),
    "inf": float("inf"),
    "negative": -1.0,
    "huge": 1e30,
    "too large for a float": 10**400,
    "text": "0.5",
    "nothing": None,
}


class Stepwise:
    """A schedule that gives something else from step 4 on."""

    def __init__(self, value: Any) -> None:
        self._value = value

    @hookimpl
    def apt_register_providers(self) -> list[ProviderSpec]:
        return [ProviderSpec("lr_schedule", "stepwise", lambda config: self)]

    def factor(self, step: int, *_: Any) -> Any:
        return 1.0 if step < 4 else self._value


@pytest.mark.parametrize("value", WILD.values(), ids=WILD)
def test_a_schedule_that_would_undo_the_weights_ends_the_run_before_it_does(
    value: Any, tmp_path: Path
) -> None:
    with pytest.raises(ProviderError, match=r"lr_schedule:stepwise of plugin stepwise .* step 4"):
        tiny_run(
            Stepwise(value),
            steps=6,
            output=tmp_path / "run",
            overrides={"training.lr_schedule_name": "stepwise"},
        )
    newest = checkpoint.newest_intact(tmp_path / "run" / "checkpoints")
    assert newest.state.step == 3


class Averaging:
    def __init__(self, value: Any, late: bool) -> None:
        self._value, self._late = value, late

    @hookimpl
    def on_training_start(self, trainer: Any) -> None:
        average = trainer.average("averaging", 0.5 if self._late else self._value)
        if self._late:
            average.decay = self._value


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("quiet") / "run"
    return tiny_run(steps=4, output=folder, overrides=SAVING)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("value", WILD.values(), ids=WILD)
def test_the_decay_of_an_average_is_judged_in_the_hook(
    value: Any, late: bool, quiet: TinyRun
) -> None:
    run = tiny_run(Averaging(value, late), steps=4, strict=False, overrides=SAVING)
    (failure,) = run.manager.records["averaging"].failures
    assert "the decay of an average" in failure.error and failure.hook == "on_training_start"
    assert run.same_weights(quiet)


class Spoiling:
    @hookimpl
    def on_step_end(self, trainer: Any, step: int) -> None:
        if step == 3:
            with torch.no_grad():
                trainer.model.embedding.weight[0, 0] = float("inf")


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 3 are not finite \(embedding.*not saved"):
        tiny_run(
            Spoiling(),
            steps=4,
            output=tmp_path / "run",
            overrides={**SAVING, "training.keep_last": 1},
        )
    (path,) = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert path.name == checkpoint.folder_name(2)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "failed" and "are not finite" in manifest["error"]


class Unspeakable:
    def __str__(self) -> str:
        raise LookupError("no text")


class Silent(StopTraining):
    def __init__(self) -> None:
        """It says nothing to its base."""


class Stopping:
    def __init__(self, reason: Any, asks: bool) -> None:
        self._reason, self._asks = reason, asks

    @hookimpl
    def on_step_end(self, trainer: Any, step: int) -> None:
        if self._asks:
            trainer.request_stop(self._reason)
        else:
            raise self._reason if isinstance(self._reason, Silent) else StopTraining(self._reason)


@pytest.mark.parametrize(
    ("reason", "told"),
    [(3, "3"), (["a"], "['a']"), ("caf\udce9", "caf\\udce9"), ("a\nb", "a"),
     (Unspeakable(), "(its message cannot be printed)"), (Silent(), "a plugin asked to stop")],
)  # fmt: skip
def test_a_reason_to_stop_is_one_line_whatever_it_is(reason: Any, told: str) -> None:
    for asks in (False,) if isinstance(reason, Silent) else (False, True):
        run = tiny_run(Stopping(reason, asks), steps=4)
        assert (run.result.step, run.manifest["reason"]) == (1, told)


class Leaving(BaseModel):
    x: int = 1

    @field_validator("x", mode="before")
    @classmethod
    def leave(cls, value: Any) -> int:
        raise SystemExit(0)


class Declaring:
    @hookimpl
    def apt_register_config(self) -> list[SectionSpec]:
        return [SectionSpec("declaring", Leaving)]


def test_a_validator_that_leaves_is_bad_input() -> None:
    with pytest.raises(ConfigError, match=r"declaring.*own check failed: SystemExit: 0"):
        tiny_run(Declaring(), steps=1, overrides={"declaring": {"x": 2}})
