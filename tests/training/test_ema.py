"""The average of the weights: its formula, and what runs with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from apt_core import hookimpl
from apt_core.inference import generate
from apt_core.optim import averages as ema
from apt_core.optim.averages import WARMUP, WeightAverage
from apt_core.planning.footprint import CountedAllocations
from apt_core.runs import Session, checkpoint
from apt_core.testing import tiny_run

QUIET = {"training.log_every_steps": 1, "evaluation.sample_tokens": 0, "hardware.num_threads": 1}
AVERAGED = {**QUIET, "training.ema_decay": 0.8, "training.learning_rate": 1e-2}


def test_it_follows_the_formula():
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.5)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    for step in range(1, 30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator(step)))
        average.update(step)
        decay = min(0.5, (1 + step) / (WARMUP + step))
        for name, p in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    for name, value in average.values.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_where_the_device_knows_whether_a_step_counts_it_takes_no_copy_of_all(monkeypatch):
    monkeypatch.setattr(ema, "PIECE_BYTES", 4 * 16 * 16)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)))
    averages = [WeightAverage(model, 0.5) for _ in range(2)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    averages[0].update(1)
    with CountedAllocations() as counted:
        averages[1].update(1, torch.zeros(()))
    assert counted.peak < 3 * ema.PIECE_BYTES < 4 * 8 * 16 * 16
    kept = {name: value.clone() for name, value in averages[1].values.items()}
    averages[1].update(2, torch.ones(()))
    for name, value in averages[0].values.items():
        torch.testing.assert_close(averages[1].values[name], value)
        assert averages[1].values[name].equal(kept[name])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_weights_come_back_as_they_were():
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model.weight.mul_(3.0)
    average.update(1)
    live, averaged = model.weight.detach().clone(), average.values["weight"].clone()
    with average.in_place():
        assert model.weight.equal(averaged)
    with pytest.raises(RuntimeError, match="in between"), average.in_place():
        raise RuntimeError("in between")
    assert model.weight.equal(live)
    assert average.values["weight"].equal(averaged)
    assert not live.equal(averaged)


def saved_average(path: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.load(path).tensors("ema")
    values = {name: torch.empty(shape) for name, (shape, _) in saved.shapes.items()}
    saved.read_into(values, "ema")
    return values


class Follows:
    """Averages the weights a second time."""

    def __init__(self) -> None:
        self.mine: dict[str, torch.Tensor] = {}

    @hookimpl
    def on_training_start(self, trainer: Any) -> None:
        self.mine = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}

    @hookimpl
    def on_step_end(self, step: int, trainer: Any) -> None:
        decay = min(0.8, (1 + step) / (WARMUP + step))
        for name, p in trainer.model.named_parameters():
            self.mine[name].lerp_(p.detach(), 1 - decay)


def test_a_run_averages_evaluates_with_it_and_keeps_it_beside_the_weights(tmp_path):
    follows = Follows()
    plain = tiny_run(steps=9, overrides={**AVERAGED, "training.ema_decay": None})
    run = tiny_run(follows, steps=9, overrides=AVERAGED, output=tmp_path / "run")
    # It observes: the weights are those of a run without it.
    assert run.same_weights(plain)
    found = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-00000009")
    averaged = saved_average(found.path)
    live = {name: torch.empty_like(weight) for name, weight in run.weights.items()}
    found.tensors("model").read_into(live, "model")
    assert averaged.keys() == live.keys()
    for name, value in averaged.items():
        torch.testing.assert_close(value, follows.mine[name], rtol=1e-5, atol=1e-7)
        assert live[name].equal(run.weights[name])
        assert not value.equal(live[name])

    assert run.result.figures["val_loss"] != plain.result.figures["val_loss"]


def test_the_evaluation_is_that_of_the_averaged_weights():
    """The held-out loss is the one which a model with these weights has."""

    class Scores:
        loss = 0.0

        @hookimpl
        def on_training_end(self, trainer: Any) -> None:
            with torch.no_grad():
                for name, parameter in trainer.model.named_parameters():
                    parameter.copy_(trainer.trained.averages.ema.values[name])
            trainer.trained.averages.ema = None
            self.loss = trainer._run.loop.evaluator.evaluate(everything=True).scores["val_loss"]

    scores = Scores()
    run = tiny_run(scores, steps=9, overrides=AVERAGED)
    assert run.result.figures["val_loss"] == scores.loss


def test_the_sample_is_from_the_averaged_weights(tmp_path, monkeypatch):
    used: dict[str, torch.Tensor] = {}

    def sampling(session: Session, *arguments: Any, **options: Any) -> Any:
        used.update({name: p.detach().clone() for name, p in session.model.named_parameters()})
        return generate(session, *arguments, **options)

    monkeypatch.setattr("apt_core.training.evaluating.generate", sampling)
    changes = {**AVERAGED, "evaluation.sample_tokens": 2}
    run = tiny_run(steps=3, overrides=changes, output=tmp_path / "run")
    averaged = saved_average(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert run.result.sample
    assert all(used[name].equal(value) for name, value in averaged.items())


def test_a_step_that_is_not_finite_leaves_the_average_finite(tmp_path):
    class Poison:
        @hookimpl
        def on_backward_end(self, step: int, trainer: Any) -> None:
            if step == 3:
                next(trainer.model.parameters()).grad.fill_(float("nan"))

    tiny_run(Poison(), steps=5, overrides=AVERAGED, output=tmp_path / "run")
    averaged = saved_average(tmp_path / "run" / "checkpoints" / "step-00000005")
    assert all(value.isfinite().all() for value in averaged.values())


def test_an_exchange_that_fails_halfway_is_undone(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    live = [parameter.detach().clone() for parameter in model.parameters()]
    clone, calls = torch.Tensor.clone, []

    def runs_out(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory for a copy")
        return clone(tensor)

    monkeypatch.setattr(torch.Tensor, "clone", runs_out)
    with pytest.raises(torch.OutOfMemoryError), average.in_place():
        pass
    assert all(map(torch.equal, model.parameters(), live))
    assert average.is_apart


def test_no_checkpoint_is_made_of_weights_that_were_not_put_back(tmp_path, monkeypatch):
    """An interrupt between the two copies of an exchange cannot be undone."""
    copy = torch.Tensor.copy_

    def interrupted(target, *arguments):
        monkeypatch.setattr(torch.Tensor, "copy_", copy)
        copy(target, *arguments)
        raise KeyboardInterrupt

    class Interrupts:
        @hookimpl
        def on_evaluation_start(self, trainer):
            if trainer.step == 3:
                monkeypatch.setattr(torch.Tensor, "copy_", interrupted)

    changes = {"training.ema_decay": 0.9, "evaluation.eval_freq": 3, "training.save_every_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        tiny_run(Interrupts(), steps=6, overrides=changes, output=tmp_path / "run")
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["step-00000002"]
