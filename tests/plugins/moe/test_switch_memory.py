"""The memory of the switch to experts: what it takes at most is what the plan says."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from apt_core import hookimpl
from apt_core.errors import TrainingError
from apt_core.modeling.structure import structure_after
from apt_core.planning.footprint import Footprint, count_bytes
from apt_core.planning.memory import (
    estimate,
    gib,
    needed,
    out_of_memory_advice,
    switch_memory,
)
from apt_core.testing import tiny_run
from apt_core.training.curriculum import switching

MOE = "apt_plugins.moe.plugin"
SIZES = {
    "model.d_model": 64,
    "model.d_ff": 256,
    "model.num_layers": 2,
    "model.moe.top_k": 2,
    "schedules.enable_moe_at_step": 2,
    "evaluation.sample_tokens": 0,
}


@pytest.fixture
def counted(monkeypatch):
    """What a run held when its switch began, gradients left out, and how much more it took."""
    found = {}
    switch, materialize = switching.Switching.switch, switching.materialize

    def counting(self, plugin):
        trained = self._run.trained
        states = [state.values() for state in trained.optimizer.state.values()]
        averages = [value for each in trained.averages.all for value in each.values.values()]
        kept = [*trained.model.parameters(), *trained.model.buffers(), *averages]
        kept += [value for values in states for value in values if isinstance(value, torch.Tensor)]
        found["kernel"], found["lasting"] = self._run.kernel, count_bytes(kept)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            taken = switch(self, plugin)
        # Of what was there before, the profiler does not see that it goes.
        live = found["peak"] = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                found["peak"] = max(found["peak"], live)
        return taken

    def seen(transform, old, **options):
        found["gradients"] = count_bytes(p.grad for p in old.parameters() if p.grad is not None)
        return materialize(transform, old, **options)

    monkeypatch.setattr(switching.Switching, "switch", counting)
    monkeypatch.setattr(switching, "materialize", seen)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"model.moe.experts": 8},
        {"model.moe.experts": 32},
        {"model.moe.experts": 8, "training.ema_decay": 0.9},
        # The logits of its trial take the most.
        {"model.d_model": 16, "model.d_ff": 32, "model.vocab_size": 8000, "training.batch_size": 2},
    ],
)
def test_a_switch_takes_at_most_what_is_planned(settings, counted):
    tiny_run(MOE, steps=2, overrides={**SIZES, **settings})
    kernel = counted["kernel"]
    old, new = (
        Footprint(kernel, structure=structure_after(kernel, plugins)) for plugins in ([], ["moe"])
    )
    before, after = estimate(old), estimate(new)
    planned = switch_memory(old, new, before, after) - before.snapshot
    assert counted["gradients"] == 0
    assert planned == pytest.approx(counted["lasting"] + counted["peak"], rel=0.03)


@pytest.mark.long
def test_a_switch_that_runs_out_of_memory_is_answered_with_what_it_fits_in(counted, monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(switching, "materialize", fails)
    sizes = {**SIZES, "model.moe.experts": 8, "model.d_ff": 1024, "training.batch_size": 8}
    with pytest.raises(TrainingError) as caught:
        tiny_run(MOE, steps=2, overrides=sizes)
    kernel = counted["kernel"]
    old, new = (
        Footprint(kernel, structure=structure_after(kernel, plugins)) for plugins in ([], ["moe"])
    )
    whole, half = (needed(old, estimate(old, batch_size=size), new) for size in (8, 4))
    assert whole > 3 * estimate(old).total
    assert f"out of memory in step 2: about {gib(whole)} are needed" in str(caught.value)
    advice = out_of_memory_advice(kernel, 1, "none", half, switching="moe")
    assert "--training.batch_size 4 " in advice and f"needs {gib(half)}" in advice
    assert "training.batch_size 1 needs" in out_of_memory_advice(
        kernel, 1, "none", estimate(old).total, switching="moe"
    )


def test_nothing_holds_the_old_model_once_the_run_has_the_new_one():
    """Nor its optimizer and averages: what they take is missing in the backward that follows."""

    class Looks:
        def __init__(self) -> None:
            self.old: dict[str, weakref.ref[Any]] = {}
            self.alive: list[str] = []

        @hookimpl
        def on_training_start(self, trainer: Any) -> None:
            held = {"model": trainer.model, "optimizer": trainer.optimizer}
            held["average"] = trainer.trained.averages.ema
            self.old = {name: weakref.ref(each) for name, each in held.items()}

        @hookimpl
        def on_backward_end(self, step: int) -> None:
            if step == 2:
                gc.collect()
                self.alive = [name for name, each in self.old.items() if each() is not None]

    looks = Looks()
    overrides = {**SIZES, "model.moe.experts": 2, "training.ema_decay": 0.9}
    tiny_run(MOE, looks, steps=3, overrides=overrides)
    assert looks.old and looks.alive == []
