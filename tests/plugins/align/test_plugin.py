"""The plugin in runs: what it leaves alone, its teacher, R-Drop, resumes, and bad input."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from apt_core import ConfigError, PluginInfo, ProviderSpec, hookimpl
from apt_core.kernel import boot
from apt_core.modeling import Carried, ModelBuilder, ModelTransform
from apt_core.providers import AlignProvider
from apt_core.testing import TINY_PROFILE
from apt_plugins.align.alignment import last_with_vein, vein_of
from apt_plugins.align.settings import BistateSettings

STEPS = 8
TERMS = ("loss/align.kl", "loss/align.info_nce")


class Shifted(torch.nn.Module):
    def __init__(self, layer, width):
        super().__init__()
        self.layer, self.shift = layer, torch.nn.Parameter(torch.empty(width))

    def init_parameter(self, name, tensor, generator, *, num_layers):
        if name == "shift":
            tensor.zero_()
        return name == "shift"

    def forward(self, x):
        return self.layer(x) + self.shift


class Shifts:
    """Adds a learned shift to the feed-forward, which gets another name thereby."""

    PLUGIN = PluginInfo()

    @hookimpl
    def apt_transform_model(self, model):
        ffn = model.blocks[0].ffn
        origins = {
            f"blocks.0.ffn.layer.{name}": Carried(f"blocks.0.ffn.{name}")
            for name, _ in ffn.named_parameters()
        }
        model.blocks[0].ffn = Shifted(ffn, model.d_model)
        return ModelTransform(model, origins)


class Watches:
    """Keeps what the teacher, the weights and the terms are in each step."""

    PLUGIN = PluginInfo()

    def __init__(self) -> None:
        self.weights, self.averages, self.decays, self.enabled = {}, {}, {}, []

    @hookimpl
    def on_plugin_enabled(self, plugin, trainer):
        if plugin == "align":
            self.enabled.append((trainer.epoch, trainer.step + 1))

    @hookimpl(priority=100)
    def on_step_start(self, step, trainer):
        self.weights[step - 1] = copied(dict(trainer.model.named_parameters()))
        if "align" in trainer.averages:
            average = trainer.averages["align"]
            self.averages[step - 1] = copied(average.values)
            self.decays[step] = average.decay


def copied(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("mode", ["ema", "rdrop"])
def test_a_weight_of_0_is_bit_identical_to_no_plugin(align_run, mode):
    dropout = {"model.dropout": 0.2, "training.mixed_precision": True}
    without = align_run(aligned=False, steps=STEPS, overrides=dropout)
    scheduled = {**dropout, "schedules.align_weight": 0}
    aligned = align_run(steps=STEPS, bistate={"mode": mode}, overrides=scheduled)
    assert aligned.same_weights(without)
    assert [row["loss"] for row in aligned.metrics if "loss" in row] == [
        row["loss"] for row in without.metrics if "loss" in row
    ]
    assert not any(name in row for row in aligned.metrics for name in TERMS)
    assert not align_run(
        steps=STEPS, bistate={"mode": mode, "weight": 0.1}, overrides=dropout
    ).same_weights(without)


def test_without_a_weight_no_second_forward_is_computed(align_run, monkeypatch):
    def output(self, input_ids):
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr("apt_core.optim.averages.WeightAverage.output", output)
    align_run(steps=2, bistate={"weight": 0})
    with pytest.raises(Exception, match="the teacher was asked"):
        align_run(steps=2, bistate={"weight": 0.5})


def test_the_teacher_is_the_mean_of_what_the_student_was(align_run):
    watches = Watches()
    align_run(
        watches,
        steps=STEPS,
        bistate={"momentum_start": 0.5, "momentum_end": 0.8, "weight": 0.5},
        overrides={"schedules.enable_align_at_step": 3},
    )
    assert min(watches.averages) == 2
    # The window is 2 steps at first and one more each step, up to 5.
    expected_decays = {3: 1 / 2, 4: 2 / 3, 5: 3 / 4, 6: 4 / 5, 7: 4 / 5, 8: 4 / 5}
    assert watches.decays == pytest.approx(expected_decays, rel=1e-12)
    teacher = {name: value.double() for name, value in watches.weights[2].items()}
    for step in range(3, STEPS):
        decay = expected_decays[step]
        for name, value in watches.weights[step].items():
            teacher[name] = decay * teacher[name] + (1 - decay) * value
            kept = watches.averages[step][name]
            torch.testing.assert_close(kept.double(), teacher[name], rtol=1e-5, atol=1e-7)
    assert not watches.averages[5]["embedding.weight"].equal(watches.weights[5]["embedding.weight"])


def test_the_teacher_goes_through_a_switch_of_the_structure(align_run):
    watches = Watches()
    options = {"steps": 6, "bistate": {"momentum_start": 0.5}}
    enabled = {"schedules.enable_align_at_step": 2, "schedules.enable_shifts_at_step": 5}
    manifest = align_run(watches, Shifts(), overrides=enabled, **options).manifest
    assert [switch["plugin"] for switch in manifest["switches"]] == ["shifts"]
    before, after = watches.averages[3], watches.averages[4]
    assert "blocks.0.ffn.layer.up.weight" not in before
    decay = watches.decays[4]
    for name, value in after.items():
        if name == "blocks.0.ffn.shift":
            assert value.abs().max() == 0
        else:
            # Through the switch came the average as it was after the step before.
            old = name.replace(".layer", "")
            expected = decay * before[old] + (1 - decay) * watches.weights[4][name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    assert watches.averages[5]["blocks.0.ffn.shift"].abs().max() > 0
    assert not after["embedding.weight"].equal(watches.weights[4]["embedding.weight"])


class Forgets:
    PLUGIN = PluginInfo()

    @hookimpl
    def on_step_end(self, step, trainer):
        if step == 5:
            del trainer.averages["align"]


@pytest.mark.parametrize(("plugins", "told"), [((), 0), ((Forgets(),), 1)])
def test_a_teacher_that_is_gone_begins_anew_and_says_so(align_run, caplog, plugins, told):
    align_run(*plugins, steps=STEPS)
    assert caplog.text.count("it starts as a copy of the model at step 6") == told
    assert caplog.text.count("no teacher was saved") == told


def test_in_its_first_step_the_teacher_agrees_with_the_student(align_run):
    run = align_run(steps=3, bistate={"beta": 0.0})
    terms = [row["loss/align.kl"] for row in run.metrics if "loss" in row]
    assert terms[0] == 0
    assert terms[2] > 0


def test_terms_weight_and_momentum_are_in_the_metrics(align_run):
    ramp = {"start": 0.0, "end": 0.3, "by": "step", "warmup": 3}
    run = align_run(
        steps=STEPS,
        overrides={"schedules.enable_align_at_step": 3, "schedules.align_weight": ramp},
    )
    rows = {row["step"]: row for row in run.metrics if "loss" in row}
    assert "align/weight" not in rows[2]
    weights = [rows[step]["align/weight"] for step in range(3, 8)]
    assert weights == pytest.approx([0, 0.1, 0.2, 0.3, 0.3])
    assert rows[3]["align/momentum"] == pytest.approx(0.99)
    assert rows[5]["align/momentum"] == pytest.approx(1 - 1 / 102)
    assert [all(name in rows[step] for name in TERMS) for step in range(2, 8)] == [
        False, False, True, True, True, True
    ]  # fmt: skip


def test_terms_are_scaled_by_the_weight(align_run):
    rows = [
        align_run(steps=1, bistate={"weight": weight}).metrics[1]["loss/align.info_nce"]
        for weight in (0.5, 1.0)
    ]
    assert rows[1] == pytest.approx(2 * rows[0], rel=1e-6)
    assert rows[0] > 0


def test_the_teacher_has_no_dropout_and_rdrop_has_it_twice(align_run):
    dropout = {"model.dropout": 0.3}
    ema = align_run(steps=2, overrides=dropout)
    rdrop = align_run(steps=2, bistate={"mode": "rdrop"}, overrides=dropout)
    first = {
        name: run.metrics[1]["loss/align.kl"] for name, run in (("ema", ema), ("rdrop", rdrop))
    }
    # The passes differ in one dropout mask, or in two.
    assert 0 < first["ema"] < first["rdrop"]
    assert "align/momentum" not in rdrop.metrics[1]


@pytest.mark.parametrize("mode", ["ema", "rdrop"])
def test_a_profile_may_name_another_objective_which_is_given_both_states(align_run, mode):
    asked = []

    class Spy(AlignProvider):
        def terms(self, live, stable, targets, *, vein=None, mutual=False):
            asked.append((mutual, stable.logits.requires_grad, tuple(vein.shape)))
            assert live.logits.requires_grad
            assert targets.shape == stable.hidden.shape[:2]
            return {"gap": (live.logits - stable.logits).square().mean()}

    class Offers:
        PLUGIN = PluginInfo()

        @hookimpl
        def apt_register_providers(self):
            return [ProviderSpec("align", "spy", Spy)]

    bistate = {"align": "spy", "mode": mode}
    run = align_run(Offers(), steps=2, bistate=bistate, overrides={"model.dropout": 0.1})
    passes = mode == "rdrop"
    assert asked == [(passes, passes, (16, 2))] * 2
    assert run.metrics[1]["loss/align.gap"] > 0


def test_runs_in_bf16(align_run):
    run = align_run(steps=4, overrides={"training.mixed_precision": True})
    rows = [row for row in run.metrics if "loss" in row]
    assert rows[0]["loss/align.kl"] == 0
    assert 0 < rows[3]["loss/align.kl"] < 0.1


@pytest.fixture(scope="module")
def wholes():
    """The runs that were not interrupted, by mode."""
    return {}


LONG = pytest.mark.long


@pytest.mark.parametrize("stop", [pytest.param(3, marks=LONG), 4, 5, pytest.param(6, marks=LONG)])
@pytest.mark.parametrize("mode", ["ema", "rdrop"])
def test_a_run_resumes_bit_exactly_around_the_switch(align_run, wholes, tmp_path, mode, stop):
    """The plugin is enabled for step 5."""
    ramp = {"start": 0.2, "end": 2.0, "by": "step", "warmup": 3}
    options = {
        "steps": STEPS,
        "bistate": {"mode": mode, **({"momentum_start": 0.5} if mode == "ema" else {})},
        "overrides": {
            "model.dropout": 0.2,
            "schedules.enable_align_at_step": 5,
            "schedules.align_weight": ramp,
        },
    }
    whole = wholes.get(mode) or align_run(output=tmp_path / "whole", **options)
    wholes[mode] = whole
    align_run(output=tmp_path / "parts", stop_at_step=stop, **options)
    resumed = align_run(output=tmp_path / "parts", resume=True, **options)
    assert resumed.same_weights(whole)
    names = ("loss", *TERMS, "align/weight", "align/momentum")
    rows = [[[row.get(name) for name in names] for row in run.metrics if "loss" in row]
            for run in (whole, resumed)]  # fmt: skip
    assert rows[0] == rows[1]
    assert rows[0][-1][2] is not None


def problems(**overrides):
    data = copy.deepcopy(TINY_PROFILE)
    data["model"].update(overrides.pop("model", {}))
    data["model"].setdefault("tva", {"s": 1})
    with pytest.raises(ConfigError) as caught:
        boot({**data, **overrides}, plugins=["apt_plugins.align.plugin"])
    return [str(problem) for problem in caught.value.problems]


def test_a_contrast_without_a_compensator_is_refused_at_the_start():
    (problem,) = problems(model={"tva": {"s": 0}})
    assert problem.startswith("profile: model.bistate.beta: ")
    assert "set model.tva.s to 1 or more, or model.bistate.beta to 0" in problem
    boot_fine(model={"tva": {"s": 0}, "bistate": {"beta": 0}})


def test_a_contrast_without_an_attention_that_has_one_is_refused_at_the_start():
    (problem,) = problems(model={"attention_name": "mha"})
    assert "no attention of this model has" in problem
    assert "model.bistate.beta to 0" in problem
    boot_fine(model={"attention_pattern": ["tva_default"]})


def boot_fine(model):
    data = copy.deepcopy(TINY_PROFILE)
    data["model"].update(model)
    data["model"].setdefault("tva", {"s": 1})
    boot(data, plugins=["apt_plugins.align.plugin"])


def test_everything_that_contradicts_is_told_at_once():
    found = problems(
        model={"bistate": {"mode": "rdrop"}, "tva": {"s": 0}},
        schedules={"align_weight": {"start": 0.1, "end": -0.1}},
    )
    assert [problem.split(": ")[1] for problem in found] == [
        "model.bistate.beta",
        "model.bistate.mode",
        "schedules.align_weight",
    ]
    assert "set model.dropout above 0" in found[1]


def test_two_passes_of_sharded_weights_are_refused():
    (problem,) = problems(
        model={"bistate": {"mode": "rdrop"}, "dropout": 0.1}, hardware={"distributed": "fsdp"}
    )
    assert "set model.bistate.mode to ema, or hardware.distributed to true" in problem


def test_an_average_that_would_grow_younger_is_refused():
    (problem,) = problems(model={"bistate": {"momentum_start": 0.9999}})
    assert problem.startswith("profile: model.bistate.momentum_start: ")


def test_nothing_to_align_is_refused():
    (problem,) = problems(model={"bistate": {"alpha": 0.0, "beta": 0}})
    assert "--plugin no:align" in problem


@pytest.mark.parametrize(
    "section",
    [{"tau_align": 0}, {"alpha": -1}, {"momentum_end": 1.0}, {"mode": "both"}, {"weigth": 1}],
)
def test_values_out_of_range_are_refused(section):
    (problem,) = problems(model={"bistate": section})
    assert f"model.bistate.{next(iter(section))}: " in problem


def test_the_vein_is_that_of_the_last_layer_that_has_one():
    sizes = {"num_layers": 3, "attention_pattern": ["tva_default", "tva_default", "mha"]}

    def build(directions):
        settings = {**TINY_PROFILE["model"], **sizes, "tva": {"s": directions}}
        kernel = boot({**TINY_PROFILE, "model": settings})
        return ModelBuilder(kernel.config, kernel.registry).build_model()

    model = build(1)
    vein = vein_of(last_with_vein(model))
    assert vein.equal(model.blocks[1].attention.compensator.orthonormal_basis())
    assert not vein.requires_grad
    torch.testing.assert_close(vein.T @ vein, torch.eye(2))
    assert last_with_vein(build(0)) is None


def test_the_momentum_does_not_depend_on_the_length_of_the_run():
    settings = BistateSettings()
    momenta = [settings.momentum(age) for age in (0, 1, 100, 900, 10**9)]
    assert momenta == pytest.approx([0.99, 1 - 1 / 101, 1 - 1 / 200, 0.999, 0.999], rel=1e-12)
    assert BistateSettings(momentum_start=0.9, momentum_end=0.9).momentum(50) == 0.9


def test_the_plugin_loads_without_torch():
    code = "import sys, apt_plugins.align.plugin; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
