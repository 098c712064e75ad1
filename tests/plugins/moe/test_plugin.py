"""The plugin in a run: what it refuses, when it acts, and what it reports."""

from __future__ import annotations

import logging
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from apt_core import ConfigError, hookimpl
from apt_core.data.packing.rows import IGNORED
from apt_core.kernel import boot
from apt_core.modeling import KeptCasts, cast_weight
from apt_core.testing import tiny_run
from apt_core.testing.tiny import TEXT
from apt_plugins.moe import experts, statistics
from apt_plugins.moe.layer import MoELayer, moe_layers
from apt_plugins.moe.plugin import Plugin

MOE = "apt_plugins.moe.plugin"
FIGURES = {
    "moe/max_violation",
    "moe/max_violation_mean",
    "moe/load_entropy",
    "moe/drop_rate",
    "moe/load_min",
    "moe/load_p25",
    "moe/load_p50",
    "moe/load_p75",
    "moe/load_max",
}
OWN = ("moe/", "loss/moe.")
EXPERTS, TOP_K = 4, 2
SETTINGS = {"model.moe.experts": EXPERTS, "model.moe.top_k": TOP_K}
LATER = {**SETTINGS, "schedules.enable_moe_at_epoch": 2}


def refused(**moe):
    with pytest.raises(ConfigError) as caught:
        boot({"plugins": [MOE], "model": {"d_ff": 96, "moe": moe}})
    return {problem.key: str(problem) for problem in caught.value.problems}


# Bad input -------------------------------------------------------------------------------------


def test_every_contradiction_is_told_at_once_with_its_remedy():
    problems = refused(experts=2, top_k=3, dropless=True, capacity=0.5, granularity=7)
    assert problems.keys() == {"model.moe.top_k", "model.moe.capacity", "model.moe.granularity"}
    assert "choose top_k <= experts" in problems["model.moe.top_k"]
    assert "set dropless to false" in problems["model.moe.capacity"]
    assert "choose a divisor of 96, such as 6" in problems["model.moe.granularity"]


@pytest.mark.parametrize(
    ("moe", "key"),
    [
        ({"expert": 4}, "model.moe.expert"),
        ({"experts": 0}, "model.moe.experts"),
        ({"capacity": 0.0}, "model.moe.capacity"),
        ({"balance_loss": -1.0}, "model.moe.balance_loss"),
        ({"shared_expert": "halves"}, "model.moe.shared_expert"),
        ({"shared_weight": 1.0}, "model.moe.shared_weight"),
    ],
)
def test_a_wrong_key_or_value_is_named(moe, key):
    assert refused(**moe).keys() == {key}


@pytest.mark.parametrize("moe", [{"dropless": True}, {"capacity": 0.5}, {"dropless": False}])
def test_a_capacity_that_contradicts_nothing_is_accepted(moe):
    boot({"plugins": [MOE], "model": {"moe": moe}})


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model.ffn_name": "vft"}, "model.ffn_name"),
        ({"model.moe.router": "x"}, "model.moe.router"),
    ],
)
def test_what_cannot_be_switched_at_epoch_2_is_told_at_the_start(change, key):
    steps = []

    class Watching:
        @hookimpl
        def on_step_end(self, step):
            steps.append(step)

    with pytest.raises(ConfigError) as caught:
        tiny_run(MOE, Watching(), overrides={**LATER, **change})
    assert [problem.key for problem in caught.value.problems] == [key]
    assert steps == []


# In a run --------------------------------------------------------------------------------------


def test_importing_the_plugin_imports_no_torch():
    code = f"import sys, {MOE}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_experts_come_at_their_epoch_and_change_nothing_at_that_moment():
    run = tiny_run(MOE, overrides=LATER)
    (switch,) = run.manifest["switches"]
    assert (switch["plugin"], switch["epoch"]) == ("moe", 2)
    assert abs(switch["loss_after"] - switch["loss_before"]) < 1e-6
    assert run.weights["blocks.0.ffn.experts.up"].shape[0] == EXPERTS
    rows = [row for row in run.metrics if "lr" in row]
    before = [row for row in rows if row["step"] < switch["step"]]
    after = [row for row in rows if row["step"] >= switch["step"]]
    assert before and after
    assert not any(key.startswith(OWN) for row in before for key in row)
    for row in after:
        assert row.keys() >= FIGURES | {"loss/moe.balance", "loss/moe.z"}
        assert 0.01 <= row["loss/moe.balance"] < 0.02
        assert row["moe/load_min"] <= 1 <= row["moe/load_max"]
        assert row["moe/max_violation"] == pytest.approx(row["moe/load_max"] - 1)
        assert 0 < row["moe/load_entropy"] <= 1
        assert 0 <= row["moe/drop_rate"] < 1


def test_without_a_schedule_experts_are_there_from_the_start():
    run = tiny_run(MOE, steps=2, overrides={**SETTINGS, "model.moe.dropless": True})
    assert "blocks.0.ffn.router.weight" in run.weights
    assert run.metrics[-1].keys() >= FIGURES or run.metrics[-2].keys() >= FIGURES
    assert [row["moe/drop_rate"] for row in run.metrics if "moe/drop_rate" in row] == [0.0]


def test_not_enabled_it_does_nothing_and_says_so(caplog):
    with caplog.at_level(logging.INFO, logger="apt"):
        run = tiny_run(MOE, steps=4, overrides={"model.moe.enabled": False})
    assert "model.moe.enabled is false: the dense feed-forward stays" in caplog.text
    assert run.same_weights(tiny_run(steps=4))
    assert not any(key.startswith(OWN) for row in run.metrics for key in row)


class Counting:
    """What other plugins see of the loads, in every step."""

    def __init__(self):
        self.seen, self.targets = [], []

    @hookimpl
    def on_step_start(self, batch):
        self.targets.append(sum(part.num_targets for part in batch))

    @hookimpl
    def on_step_end(self, trainer):
        layers = moe_layers(trainer.model)
        self.seen.append([layer.load.sum().item() for layer in layers])


def test_a_step_counts_its_own_tokens_in_all_micro_batches():
    counting = Counting()
    run = tiny_run(MOE, counting, overrides={**SETTINGS, "training.grad_accum_steps": 2}, steps=5)
    assert run.result.step == 5
    counted = [int(load) for (load,) in counting.seen]
    assert max(counted) == 2 * 4 * 16 * TOP_K > min(counted)
    assert counted == [targets * TOP_K for targets in counting.targets]


@pytest.mark.parametrize("priority", [0, 50])
@pytest.mark.parametrize("length", [16, 7])
def test_a_second_forward_by_another_plugin_is_not_counted(priority, length):
    class Again:
        @hookimpl(priority=priority)
        def apt_loss_terms(self, trainer, batch):
            other = batch.input_ids.flip(0)[:, :length]
            return {"twice": 0.0 * trainer.model(other).logits.mean()}

    once, twice = (tiny_run(MOE, *more, steps=4, overrides=SETTINGS) for more in ((), (Again(),)))
    assert once.same_weights(twice)
    for first, second in zip(once.metrics, twice.metrics, strict=True):
        assert all(first[key] == second[key] for key in first if key.startswith(OWN))


@pytest.mark.parametrize("world_size", [1, 2])
def test_counts_of_several_processes_are_summed_at_the_end_of_a_step(monkeypatch, world_size):
    summed = []
    monkeypatch.setattr(statistics, "sum_over_processes", summed.append)
    layers = [SimpleNamespace(counted_step=0)]
    moe = Plugin()
    monkeypatch.setattr(moe, "moe_layers_of", lambda trainer: layers)
    moe.on_step_end(step=7, trainer=SimpleNamespace(world_size=world_size))
    assert layers[0].counted_step == 7
    assert summed == [layers] * (world_size - 1)


def test_other_plugins_see_the_sums():
    """The hook that sums runs before those of normal priority."""
    kernel = boot({"plugins": [MOE], "model": {"moe": {}}}, manager=None)
    kernel.manager.register(Counting(), "aaa")
    order = [call.plugin for call in kernel.manager.order("on_step_end", dormant=True)]
    assert order.index("moe") < order.index("aaa")


def test_the_router_has_two_names():
    kernel = boot({"plugins": [MOE], "model": {"moe": {}}})
    assert kernel.registry.list_providers("router") == {"router": ["topk_default", "topk_moe"]}


def test_nothing_is_dropped_in_the_first_steps_after_the_switch():
    tight = {"model.moe.capacity": 0.3, "model.moe.dropless_steps": 3}
    overrides = {**LATER, **tight, "training.log_every_steps": 1}
    run = tiny_run(MOE, overrides=overrides)
    rates = {row["step"]: row["moe/drop_rate"] for row in run.metrics if "moe/drop_rate" in row}
    first = min(rates)
    assert [rates[step] for step in range(first, first + 3)] == [0.0] * 3
    assert all(rates[step] > 0.1 for step in range(first + 3, max(rates) + 1))
    assert max(rates) > first + 3


@pytest.mark.parametrize("rdrop", [False, True])
def test_padding_takes_no_place_of_an_expert(tmp_path, rdrop):
    """Every step has 65 targets in 80 positions, those of the last window in front of padding; a
    second pass of the model knows of it too."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:66], encoding="utf-8")

    class Watching:
        def __init__(self):
            self.taken, self.kept = [], []

        @hookimpl
        def on_step_start(self, batch):
            (self.batch,) = batch

        @hookimpl
        def on_backward_end(self, trainer):
            is_target = (self.batch.targets != IGNORED).flatten()
            for layer in moe_layers(trainer.model):
                self.taken.append(int(layer.kept[~is_target].sum()))
                self.kept.append(int(layer.kept[is_target].sum()))

    watching = Watching()
    tiny_run(
        MOE,
        *(["apt_plugins.align.plugin"] if rdrop else []),
        watching,
        overrides={
            **SETTINGS,
            "data": {"train_path": str(text), "val_path": str(text)},
            "training.batch_size": 5,
            "training.max_epochs": 4,
            "model.dropout": 0.1,
            "model.moe.dropless_steps": 0,
            "model.moe.capacity": 1.0,
            **({"model.bistate": {"mode": "rdrop", "beta": 0.0}} if rdrop else {}),
        },
    )
    assert watching.taken == [0] * 4
    assert all(0 < kept <= EXPERTS * 33 for kept in watching.kept)  # ceil(65 * 2 / 4)


@pytest.mark.parametrize("all_of_them", [False, True])
def test_layers_that_a_plugin_keeps_in_eval_mode_are_not_counted_and_cost_nothing(all_of_them):
    class Stills:
        @hookimpl
        def on_step_start(self, step, trainer):
            if step == 3:
                for block in trainer.model.blocks[: None if all_of_them else 1]:
                    block.eval()

    two_layers = {**SETTINGS, "model.num_layers": 2, "training.log_every_steps": 1}
    run = tiny_run(MOE, Stills(), steps=5, overrides=two_layers)
    assert run.manager.records["moe"].state == "active"
    last = next(row for row in reversed(run.metrics) if "loss" in row)
    assert FIGURES.isdisjoint(last) if all_of_them else set(last) >= FIGURES


def test_micro_batches_of_a_step_share_the_casts_of_experts(monkeypatch):
    """By step: how many forwards, and how many casts of one weight. With other casts in each
    forward the run is the same."""
    kept: list[int] = []
    by_step: list[tuple[int, int]] = []

    def noting(weight, dtype):
        cast = cast_weight(weight, dtype)
        if layers and weight is layers[0].experts.up:
            kept.append(cast)
        return cast

    class Counting:
        @hookimpl
        def on_step_start(self, trainer):
            kept.clear()
            layers[:] = moe_layers(trainer.model)

        @hookimpl
        def on_step_end(self):
            by_step.append((len(kept), len({id(cast) for cast in kept})))

    overrides = {
        **SETTINGS,
        "training.grad_accum_steps": 3,
        "training.mixed_precision": True,
        "evaluation.sample_tokens": 0,
    }
    layers: list[MoELayer] = []
    monkeypatch.setattr(experts, "cast_weight", noting)
    run = tiny_run(MOE, Counting(), steps=2, overrides=overrides)
    assert by_step == [(3, 1), (3, 1)]
    monkeypatch.setattr(KeptCasts, "used", lambda self, dtype: nullcontext())
    apart = tiny_run(MOE, Counting(), steps=2, overrides=overrides)
    assert by_step[2:] == [(3, 3), (3, 3)]
    assert run.same_weights(apart)
