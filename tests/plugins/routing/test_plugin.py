"""Routing in whole runs, and its settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apt_core import ConfigError, hookimpl
from apt_core.kernel import boot
from apt_core.testing import TINY_PROFILE, tiny_run
from apt_plugins.moe.layer import moe_layers

MOE, ROUTING = "apt_plugins.moe.plugin", "apt_plugins.routing.plugin"
ROOT = Path(__file__).parents[3]
SMALL = {
    **TINY_PROFILE,
    "model": {**TINY_PROFILE["model"], "moe": {"experts": 4, "scores": "sigmoid"}},
}


class Watches:
    """Notes what the first MoE layer is set to in each step, and what evaluations compute with."""

    def __init__(self):
        self.steps, self.evaluations = {}, {}

    @hookimpl(priority=99)
    def on_step_start(self, step, trainer):
        self.steps[step] = self.look(trainer)

    @hookimpl(priority=99)
    def on_evaluation_start(self, trainer):
        self.evaluations[trainer.step] = self.look(trainer)

    def look(self, trainer):
        layers = moe_layers(trainer.model)
        if not layers:
            return None
        first = layers[0]
        return round(float(first.router.temperature), 4), first.capacity, first.router.explores


def test_the_schedule_sets_temperature_and_capacity_from_the_switch_on():
    watches = Watches()
    tiny_run(
        MOE,
        ROUTING,
        watches,
        profile=SMALL,
        overrides={
            "routing.exploration": 0.5,
            "schedules.enable_moe_at_epoch": 2,
            "schedules.route_temp": {"start": 1.5, "end": 0.5, "by": "epoch"},
            "schedules.moe_capacity": {"start": 2.0, "end": 1.0, "by": "epoch"},
            "training.max_epochs": 3,
        },
    )
    values = list(dict.fromkeys(watches.steps.values()))
    assert values == [None, (1.0, 1.5, True), (0.5, 1.0, True)]
    last = max(watches.evaluations)
    assert watches.evaluations[last] == (0.5, 1.0, True)


@pytest.mark.parametrize("stop", [5, 8])
def test_a_resumed_run_is_bit_identical_and_evaluates_at_the_same_temperature(tmp_path, stop):
    overrides = {
        "routing.exploration": 1.0,
        "routing.balancing": "bias",
        "routing.bias_rate": 0.01,
        "schedules.route_temp": {"start": 1.5, "end": 0.5, "by": "step", "until": 10},
        "schedules.moe_capacity": {"start": 2.0, "end": 1.0, "by": "step", "until": 10},
        "training.max_epochs": 1,
    }
    whole, part = Watches(), Watches()
    shared = {"profile": SMALL, "overrides": overrides}
    straight = tiny_run(MOE, ROUTING, whole, output=tmp_path / "whole", **shared)
    options = {"output": tmp_path / "part", **shared}
    tiny_run(MOE, ROUTING, Watches(), stop_at_step=stop, **options)
    resumed = tiny_run(MOE, ROUTING, part, resume=True, **options)
    assert resumed.same_weights(straight)
    assert part.steps == {step: seen for step, seen in whole.steps.items() if step > stop}
    assert part.evaluations.items() <= whole.evaluations.items()
    straight_losses, losses = (
        {row["step"]: row["val_loss"] for row in run.metrics if "val_loss" in row}
        for run in (straight, resumed)
    )
    assert straight_losses.items() <= losses.items()


def test_a_run_without_experts_is_told_once_and_goes_on(caplog):
    overrides = {"schedules.route_temp": 1.5, "routing.balancing": "bias"}
    run = tiny_run(ROUTING, steps=4, overrides=overrides)
    assert run.same_weights(tiny_run(steps=4))
    assert caplog.text.count("routing does nothing: the run has no mixture of experts") == 1
    caplog.clear()
    tiny_run(MOE, ROUTING, steps=2, profile=SMALL, overrides=overrides)
    assert "routing does nothing" not in caplog.text


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"model": {"moe": {"dropless": True}}, "schedules": {"moe_capacity": 1.5}},
            "schedules.moe_capacity: .*model.moe.dropless to false",
        ),
        (
            {"schedules": {"route_temp": {"start": 1.0, "end": 0.0}}},
            "schedules.route_temp: .*a temperature must be more than 0",
        ),
        (
            {"schedules": {"moe_capacity": -1.0}},
            "schedules.moe_capacity: .*a capacity must be more than 0",
        ),
        ({"routing": {"exploration": -0.5}}, "routing.exploration"),
        ({"routing": {"balancing": "loss"}}, "routing.balancing"),
    ],
)
def test_bad_settings_are_told_at_the_start(keys, says):
    model = {**TINY_PROFILE["model"], **keys.get("model", {})}
    with pytest.raises(ConfigError, match=says):
        boot({**TINY_PROFILE, **keys, "model": model}, plugins=[MOE, ROUTING], files=False)


def test_without_the_moe_plugin_its_section_contradicts_nothing():
    model = {**TINY_PROFILE["model"], "moe": {"experts": 4}}
    data = {**TINY_PROFILE, "model": model, "schedules": {"moe_capacity": 1.5}}
    boot(data, plugins=[ROUTING], files=False)


def test_the_plugin_needs_no_torch_before_a_run():
    code = f"import sys, {ROUTING}; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
