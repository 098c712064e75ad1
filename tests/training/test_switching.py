"""Promises 4 and 5 for a plugin that changes the structure of the model in mid-run."""

from __future__ import annotations

import inspect
import itertools
import json
import signal
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from apt_core import hookimpl
from apt_core.errors import CheckpointError, ConfigError, PluginError
from apt_core.runs.checkpoint import list_checkpoints
from apt_core.testing import TINY_PROFILE, TinyRun, tiny_run
from apt_core.testing.tiny import TEXT
from apt_core.training import Trainer
from apt_core.training.curriculum import rehearsal

EPOCH = 5
SETTINGS = {
    "model.dropout": 0.1,
    "training.batch_size": 5,
    "training.grad_accum_steps": 2,
    "training.log_every_steps": 1,
    "training.keep_last": 0,
    "training.warmup_steps": 3,
    "evaluation.eval_freq": 2,
    "evaluation.sample_tokens": 0,
    "hardware.num_threads": 1,
}

WIDER = """
import torch
from torch import nn
from apt_core import hookimpl

class Shift(nn.Module):
    '''Adds nothing at first; with a buffer that is computed and one that is not.'''
    def __init__(self, width):
        super().__init__()
        self.shift = nn.Parameter(torch.empty(width))
        self.register_buffer("ones", torch.ones(width), persistent=False)
        self.register_buffer("calls", torch.zeros(()))

    def init_parameter(self, name, tensor, generator, *, num_layers):
        tensor.zero_()
        return True

    def reset_buffers(self):
        self.ones.fill_(1.0)
        self.calls.zero_()

    def forward(self, x):
        self.calls += self.training
        return x + self.shift * self.ones

@hookimpl
def apt_transform_model(model, config):
    '''Every hidden unit of the feed-forwards twice, at half the weight, and a shift after each.'''
    from apt_core.modeling import Carried, ModelTransform
    from apt_core.modeling.layers import SwiGLU

    def twice(rows):
        return torch.cat([rows, rows])

    origins = {}
    for index, block in enumerate(model.blocks):
        path = f"blocks.{index}.ffn"
        block.ffn = nn.Sequential(
            SwiGLU(model.d_model, 2 * block.ffn.d_ff), Shift(model.d_model)
        )
        for name in ("gate", "up"):
            origins[f"{path}.0.{name}.weight"] = Carried(
                f"{path}.{name}.weight",
                value=twice,
                first_moment=lambda m: twice(m) / 2,
                second_moment=lambda v: twice(v) / 4,
            )
        origins[f"{path}.0.down.weight"] = Carried(
            f"{path}.down.weight",
            value=lambda w: torch.cat([w, w], 1) / 2,
            first_moment=lambda m: torch.cat([m, m], 1),
            second_moment=lambda v: torch.cat([v, v], 1),
        )
    return ModelTransform(model, origins, added_flops=6 * model.d_model * config.model.d_ff)
"""

TEACHER = """
from apt_core import hookimpl

@hookimpl
def on_plugin_enabled(plugin, trainer):
    if plugin == "teacher":
        trainer.average("teacher", 0.9)

@hookimpl
def on_step_start(step, trainer):
    trainer.average("teacher", 0.9).decay = 0.9 + 0.001 * step

@hookimpl
def apt_loss_terms(trainer, batch, output):
    stable = trainer.average("teacher", 0.9).output(batch)
    assert not stable.logits.requires_grad
    return {"distance": 0.1 * (output.logits - stable.logits).square().mean()}
"""

OUTER = """
from torch import nn
from apt_core import hookimpl

@hookimpl
def apt_transform_model(model):
    '''The next of several transforms: it finds the structure that the one before has left.'''
    from apt_core.modeling import Carried, ModelTransform
    names = [name for name, _ in model.blocks[0].ffn.named_parameters()]
    origins = {f"blocks.0.ffn.0.{n}": Carried(f"blocks.0.ffn.{n}") for n in names}
    model.blocks[0].ffn = nn.Sequential(model.blocks[0].ffn)
    return ModelTransform(model, origins)
"""


@dataclass
class Experiment:
    """A tiny profile with plugins on disk, trained as often as asked."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def plugin(self, name: str, source: str) -> Experiment:
        path = self.folder / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        self.files += (path,)
        return self

    def train(self, name: str, *plugins: Any, changes: Any = (), **options: Any) -> TinyRun:
        text = self.folder / "text.txt"
        text.write_text(TEXT, encoding="utf-8")
        return tiny_run(
            *map(str, self.files),
            *plugins,
            **{"strict": False, **options},
            profile={**TINY_PROFILE, "data": {"train_path": str(text)}},
            overrides={**SETTINGS, **self.settings, **dict(changes)},
            output=self.folder / name,
        )

    def checkpoints(self, name: str = "run") -> list[Path]:
        return list_checkpoints(self.folder / name / "checkpoints")

    def log(self, name: str) -> str:
        return (self.folder / name / "log.txt").read_text(encoding="utf-8")


def wider_in(folder: Path) -> Experiment:
    return Experiment(folder, {"schedules.enable_wider_at_epoch": 2}).plugin("wider", WIDER)


@pytest.fixture
def wider(tmp_path: Path) -> Experiment:
    return wider_in(tmp_path)


class Looks:
    """What the run's parts are around the switch."""

    def __init__(self) -> None:
        self.models: list[Any] = []
        self.moments: list[dict[str, dict[str, torch.Tensor]]] = []

    @hookimpl
    def on_step_start(self, trainer: Trainer) -> None:
        if trainer.model not in self.models:
            self.models.append(trainer.model)
        optimizer = trainer.optimizer
        self.moments.append(
            {
                name: {k: v.clone() for k, v in optimizer.state.get(p, {}).items()}
                for name, p in trainer.model.named_parameters()
            }
        )


def losses(run: TinyRun) -> list[float]:
    return [row["loss"] for row in run.metrics if "loss" in row]


def test_a_switch_changes_no_output_and_is_recorded(wider: Experiment) -> None:
    looks = Looks()
    run = wider.train("run", looks)
    (switch,) = run.manifest["switches"]
    assert (switch["plugin"], switch["epoch"], switch["step"]) == ("wider", 2, EPOCH + 1)
    assert abs(switch["loss_after"] - switch["loss_before"]) < 1e-6
    assert run.manifest["timeline"] == [
        {"plugin": "wider", "event": "enabled", "epoch": 2, "step": EPOCH + 1}
    ]
    before, after = (sum(p.numel() for p in model.parameters()) for model in looks.models)
    assert before < after == run.manifest["parameters"]
    assert f"wider changed the model: {after:,} parameters, {before:,} before" in wider.log("run")
    state = json.loads((wider.checkpoints()[-1] / "state.json").read_text(encoding="utf-8"))
    assert state["transforms"] == [switch]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, TinyRun]:
    """The same run without the plugin."""
    experiment = wider_in(tmp_path_factory.mktemp("dense"))
    return experiment, experiment.train("run", "no:wider")


def test_the_steps_before_are_those_of_a_run_without_it(wider: Experiment) -> None:
    wider.settings["model.dropout"] = 0.0
    run, dense = wider.train("run"), wider.train("dense", "no:wider")
    assert losses(run)[: EPOCH + 1] == pytest.approx(losses(dense)[: EPOCH + 1], abs=1e-6)
    assert losses(run)[:EPOCH] == losses(dense)[:EPOCH]
    assert losses(run)[EPOCH + 1 :] != losses(dense)[EPOCH + 1 :]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_state_is_carried_by_the_rules(wider: Experiment, optimizer: str) -> None:
    looks = Looks()
    wider.train("run", looks, changes={"training.optimizer_name": optimizer})
    saved = load_file(wider.checkpoints()[0] / "optimizer.safetensors")
    assert wider.checkpoints()[0].name.endswith(f"{EPOCH:08d}")
    after = looks.moments[EPOCH]
    rate = {"exp_avg": 2, "momentum_buffer": 2, "exp_avg_sq": 4}
    for name, state in after.items():
        if name.endswith("shift"):
            assert state == {}
        elif name.endswith("ffn.0.up.weight"):
            for key, value in state.items():
                old = saved[name.replace("ffn.0.", "ffn.") + f"//{key}"]
                if key in rate:
                    old = torch.cat([old, old]) / rate[key]
                assert value.equal(old), (name, key)
        elif ".ffn.0." not in name:
            assert state
            for key, value in state.items():
                assert value.equal(saved[f"{name}//{key}"]), (name, key)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_on_either_side_of_the_switch_and_resumed_is_in_one_go(
    wider: Experiment, in_children, differences, killer, optimizer: str
) -> None:
    """One kill after another, with averages of the weights, the profile's and a plugin's, that go
    through the switch."""
    wider.plugin("teacher", TEACHER)
    wider.settings |= {
        "training.optimizer_name": optimizer,
        "training.ema_decay": 0.9,
        "schedules.enable_teacher_at_step": 3,
    }
    whole = wider.train("whole", strict=True)
    assert (whole.result.step, len(whole.manifest["switches"])) == (2 * EPOCH, 1)
    saving = {"training.save_every_steps": 1}
    for n in (EPOCH - 1, EPOCH, EPOCH + 1):
        again = n >= EPOCH
        part = partial(wider.train, "killed", killer(n), changes=saving, resume=again)
        assert in_children(part) == [-signal.SIGKILL]
    resumed = wider.train("killed", resume=True)
    assert resumed.manifest["switches"] == whole.manifest["switches"]
    assert all(f"(step {n})" in wider.log("killed") for n in (EPOCH - 1, EPOCH, EPOCH + 1))
    assert differences(wider.folder / "whole", wider.folder / "killed") == []


@pytest.mark.parametrize("unit", ["step", "token"])
def test_a_switch_at_a_border_that_a_resume_meets_is_in_one_go(
    wider: Experiment, in_children, differences, killer, unit: str
) -> None:
    """By step and by token it is due at once after the checkpoint: not before the evaluation of
    the step that was taken is done."""
    del wider.settings["schedules.enable_wider_at_epoch"]
    whole = wider.train("whole", changes={"schedules.enable_wider_at_step": 7})
    tokens = next(row["tokens"] for row in whole.metrics if row["step"] == 6)
    when = {"step": 7, "token": tokens}[unit]
    wider.settings[f"schedules.enable_wider_at_{unit}"] = when
    saving = {"training.save_every_steps": 1}
    assert in_children(lambda: wider.train("killed", killer(6), changes=saving)) == [-9]
    resumed = wider.train("killed", resume=True)
    assert [switch["step"] for switch in resumed.manifest["switches"]] == [7]
    assert differences(wider.folder / "whole", wider.folder / "killed") == []


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.long
def test_two_processes_switch_together_and_resume_exactly(
    wider: Experiment, in_children, differences, killer, ranks, sharding: str
) -> None:
    wider.plugin("teacher", TEACHER)
    wider.settings |= {
        "hardware.distributed": sharding,
        "training.batch_size": 2,
        "training.ema_decay": 0.9,
        "schedules.enable_teacher_at_step": 3,
        "model.dropout": 0.0,  # each process draws its own
    }
    assert in_children(*ranks(lambda: wider.train("whole", strict=True))) == [0, 0]
    saving = {"training.save_every_steps": 1}
    killed = ranks(lambda: wider.train("killed", killer(7), changes=saving))
    assert in_children(*killed) == [-signal.SIGKILL] * 2
    assert in_children(*ranks(lambda: wider.train("killed", resume=True))) == [0, 0]
    assert differences(wider.folder / "whole", wider.folder / "killed") == []
    alone = wider.train("alone", changes={"training.grad_accum_steps": 4})
    lines = (wider.folder / "whole" / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [row for row in map(json.loads, lines.splitlines()) if "loss" in row]
    assert [row["loss"] for row in rows] == pytest.approx(losses(alone), abs=1e-5)


def test_several_transforms_follow_each_other(wider: Experiment, differences, in_children, killer):
    wider.plugin("outer", OUTER)
    wider.settings |= {"schedules.enable_outer_at_step": 8}
    whole = wider.train("whole", strict=True)
    assert [switch["plugin"] for switch in whole.manifest["switches"]] == ["wider", "outer"]
    assert "blocks.0.ffn.0.0.up.weight" in load_file(
        wider.checkpoints("whole")[-1] / "model.safetensors"
    )
    saving = {"training.save_every_steps": 1}
    assert in_children(lambda: wider.train("killed", killer(9), changes=saving)) == [-9]
    wider.train("killed", resume=True)
    assert differences(wider.folder / "whole", wider.folder / "killed") == []


def test_a_plugin_without_a_schedule_transforms_the_model_at_the_start(wider: Experiment) -> None:
    del wider.settings["schedules.enable_wider_at_epoch"]
    (switch,) = wider.train("run").manifest["switches"]
    assert switch["step"] == 1


FAULTS = {
    "raises": ("return ModelTransform(", "raise OSError('no')\n    return ModelTransform("),
    "raises when values are made": ("value=twice,", "value=lambda rows: 1 / 0,"),
    "changes the loss": ("torch.cat([w, w], 1) / 2", "torch.cat([w, w], 1)"),
    "gives no number": (
        "tensor.zero_()\n        return",
        "tensor.fill_(float('nan'))\n        return",
    ),
    "gives another shape": ("value=twice,", "value=lambda rows: rows,"),
    "moments of another shape": ("first_moment=lambda m: twice(m) / 2", "first_moment=lambda m: m"),
    "forgets a parameter": ('for name in ("gate", "up"):', 'for name in ("gate",):'),
    "names no parameter": (
        'origins[f"{path}.0.down.weight"]',
        'origins[f"{path}.0.dawn.weight"]',
    ),
    "is on the CPU": ("origins = {}", "origins = {}; model.blocks.to_empty(device='cpu')"),
    "returns something else": ("return ModelTransform(model, origins", "return dict(origins"),
    "writes to what it is given": ("value=twice,", "value=lambda rows: twice(rows.mul_(1.5)),"),
    "writes to moments": ("lambda m: twice(m) / 2", "lambda m: twice(m.zero_())[1:]"),
    "finds the profile wrong too late": (
        "value=twice,",
        "value=lambda w: (_ for _ in ()).throw(__import__('apt_core').ConfigError('no')),",
    ),
    "leaves": ("value=twice,", "value=lambda rows: __import__('sys').exit(3),"),
    "has a buffer that nothing computes": ("def reset_buffers", "def reset_nothing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_transform_that_fails_leaves_the_run_as_it_would_be_without(
    wider: Experiment, dense: tuple[Experiment, TinyRun], fault: str
) -> None:
    right, wrong = FAULTS[fault]
    assert right in WIDER
    wider.files = ()
    # Of another size: Python tells sources of one second apart by nothing else.
    wider.plugin("wider", WIDER.replace(right, wrong) + "# changed")
    run = wider.train("run")
    assert losses(run) == losses(dense[1])
    assert run.same_weights(dense[1])
    optimizers = [
        load_file(experiment.checkpoints()[-1] / "optimizer.safetensors")
        for experiment in (wider, dense[0])
    ]
    assert optimizers[0].keys() == optimizers[1].keys()
    assert all(tensor.equal(optimizers[1][name]) for name, tensor in optimizers[0].items())
    assert run.manifest["switches"] == []
    (plugin,) = (p for p in run.manifest["plugins"] if p["name"] == "wider")
    assert plugin["state"] == "quarantined"
    assert "failed in apt_transform_model" in wider.log("run")
    with pytest.raises(PluginError, match="wider failed in apt_transform_model"):
        wider.train("strict", strict=True)


def test_a_failing_transform_is_found_at_the_start(wider: Experiment) -> None:
    wider.files = ()
    wider.plugin("wider", WIDER.replace("origins = {}", "origins = {}\n    raise OSError('no')"))
    with pytest.raises(PluginError, match="at step 0"):
        wider.train("run", strict=True)


@pytest.mark.parametrize("most", [2**23, 20_000, 2_000])
def test_a_transform_that_changes_the_loss_is_found_at_the_start(
    wider: Experiment, monkeypatch, most: int
) -> None:
    """By the profile's own model, or by a smaller copy of it; where that is too large too, when it
    is due."""
    monkeypatch.setattr(rehearsal, "MOST", most)
    wider.settings |= {"model.num_layers": 4, "model.vocab_size": 2048}
    wider.files = ()
    wider.plugin("wider", WIDER.replace("torch.cat([w, w], 1) / 2", "torch.cat([w, w], 1)"))
    when = "step 0" if most > 2_000 else f"step {EPOCH}"
    with pytest.raises(PluginError, match=f"wider failed in apt_transform_model at {when}") as told:
        wider.train("strict", strict=True)
    assert ("a copy of the model with fewer layers and ids" in str(told.value)) == (most == 20_000)
    (wider.folder / "wider.py").write_text(WIDER, encoding="utf-8")
    assert len(wider.train("right", strict=True).manifest["switches"]) == 1


def test_what_cannot_be_tried_before_the_start_is_told_there(wider: Experiment) -> None:
    wider.files = ()
    wider.plugin("wider", WIDER.replace("value=twice,", "value=lambda rows: 1 / 0,"))
    wider.train("run")
    said = "what wider will make of the model could not be tried before the start: ZeroDivision"
    assert said in wider.log("run")
    with pytest.raises(PluginError, match=r"at step 0 .*ZeroDivisionError"):
        wider.train("strict", strict=True)


def test_a_profile_that_a_transform_refuses_is_bad_input_at_the_start(wider: Experiment) -> None:
    wider.files = ()
    refusal = "from apt_core import ConfigError\n    raise ConfigError('model.d_ff: too odd')"
    wider.plugin("wider", WIDER.replace("origins = {}", refusal))
    with pytest.raises(ConfigError, match=r"model\.d_ff: too odd"):
        wider.train("run")
    assert not (wider.folder / "run").exists()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_failure_in_one_process_leaves_the_model_in_both(
    wider: Experiment, in_children, ranks, sharding: str
) -> None:
    only_second = "value=twice if __import__('os').environ['RANK'] == '0' else (lambda w: 1 / 0),"
    wider.files = ()
    wider.plugin("wider", WIDER.replace("value=twice,", only_second))
    wider.settings |= {"hardware.distributed": sharding, "training.batch_size": 2}
    assert in_children(*ranks(lambda: wider.train("run"))) == [0, 0]
    manifest = json.loads((wider.folder / "run" / "manifest.json").read_text(encoding="utf-8"))
    (plugin,) = (p for p in manifest["plugins"] if p["name"] == "wider")
    assert (plugin["state"], manifest["switches"]) == ("quarantined", [])
    assert "in process 1" in plugin["reason"]


def test_a_quarantined_plugin_has_changed_the_model_for_good(
    wider: Experiment, in_children, differences, killer
) -> None:
    """It failed after its switch: the structure stays, also over a resume."""
    fails = "\n@hookimpl\ndef apt_loss_terms(trainer):\n    if trainer.step == 6:\n        1 / 0\n"
    wider.files = ()
    wider.plugin("wider", WIDER + fails).plugin("outer", OUTER)
    wider.settings |= {"schedules.enable_outer_at_step": 9}
    whole = wider.train("whole")
    assert len(whole.manifest["switches"]) == 2
    saving = {"training.save_every_steps": 1}
    assert in_children(lambda: wider.train("killed", killer(8), changes=saving)) == [-9]
    wider.train("killed", resume=True)
    found = differences(wider.folder / "whole", wider.folder / "killed")
    assert [item for item in found if item != "the state: plugin_records"] == []


GROUPS = """
from apt_core import hookimpl

@hookimpl
def apt_param_groups(model):
    return [{"params": [model.blocks[0].ffn.up.weight], "lr_scale": 0.5}]

@hookimpl
def apt_loss_terms(trainer, output):
    return {"small": 1e-3 * output.logits.square().mean()}
"""
"""Groups that only the structure at the start has."""


def test_plugins_that_fail_on_a_refused_model_go_on(wider: Experiment) -> None:
    wider.plugin("groups", GROUPS)
    without = wider.train("without", "no:wider")
    run = wider.train("run")
    assert losses(run) == losses(without)
    assert run.same_weights(without)
    states = {p["name"]: p["state"] for p in run.manifest["plugins"]}
    assert (states["groups"], states["wider"]) == ("active", "quarantined")
    assert "groups: AttributeError" in wider.log("run")
    with pytest.raises(PluginError, match="groups failed in apt_param_groups"):
        wider.train("strict", strict=True)


UPS = """
from apt_core import hookimpl

@hookimpl
def apt_param_groups(model):
    ups = [parameter for name, parameter in model.named_parameters() if "up" in name]
    return [{"params": ups, "lr_scale": 0.5}]

@hookimpl
def on_step_end(step):
    1 / 0
"""


def test_who_was_quarantined_before_the_switch_has_no_say_in_the_groups_after_a_resume(
    wider: Experiment, differences, in_children, killer
) -> None:
    """Its groups would be others than those that the run has had."""
    wider.plugin("groups", UPS)
    whole = wider.train("whole")
    assert whole.manifest["switches"][0]["quarantined"] == ["groups"]
    saving = {"training.save_every_steps": 1}
    assert in_children(lambda: wider.train("killed", killer(8), changes=saving)) == [-9]
    wider.train("killed", resume=True)
    assert differences(wider.folder / "whole", wider.folder / "killed") == []


FREEZER = """
from apt_core import hookimpl

@hookimpl
def on_training_start(trainer):
    '''It does not ask whether the run was resumed.'''
    freeze(trainer, True, "gate.weight", "up.weight", "down.weight")

@hookimpl
def on_step_start(step, trainer):
    if step == 3:
        freeze(trainer, False, "gate.weight")
    if step == 4:
        freeze(trainer, True, "qkv_weight")
        trainer.model.blocks[0].ffn.eval()  # without dropout
    if step == 7:
        freeze(trainer, False, "down.weight")
        trainer.model.blocks[0].attention.eval()

@hookimpl
def apt_metrics(trainer):
    return {"eval": sum(not module.training for module in trainer.model.modules())}

def freeze(trainer, frozen, *parts):
    for name, parameter in trainer.model.named_parameters():
        if name.startswith("blocks.0.") and name.endswith(parts):
            parameter.requires_grad_(not frozen)
"""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_frozen_is_so_over_a_switch_and_a_resume_until_it_is_thawed(
    wider: Experiment, differences, in_children, killer, optimizer: str
) -> None:
    wider.plugin("freezer", FREEZER)
    wider.settings |= {"training.optimizer_name": optimizer, "training.ema_decay": 0.9}
    saving = {"training.save_every_steps": 1}
    wider.train("whole", changes=saving)
    for step in (4, 8) if optimizer == "muon" else (2, 6):
        name = f"killed_{step}"
        assert in_children(lambda n=name, s=step: wider.train(n, killer(s), changes=saving)) == [-9]
        wider.train(name, changes=saving, resume=True)
        assert differences(wider.folder / "whole", wider.folder / name) == [], name
    weights, states = (
        [load_file(path / f"{kind}.safetensors") for path in wider.checkpoints("whole")]
        for kind in ("model", "optimizer")
    )

    def moved(name: str) -> list[int]:
        """The steps that have changed it, of those before which it was there."""
        pairs = enumerate(itertools.pairwise(weights), start=2)
        return [
            step
            for step, (before, after) in pairs
            if name in before.keys() & after.keys() and not before[name].equal(after[name])
        ]

    assert moved("blocks.0.ffn.up.weight") == moved("blocks.0.ffn.0.up.weight") == []
    assert moved("blocks.0.ffn.gate.weight") == [3, 4, 5]
    assert moved("blocks.0.ffn.0.down.weight")[0] == 7
    assert moved("blocks.0.attention.qkv_weight") == [2, 3]
    up = weights[0]["blocks.0.ffn.up.weight"]
    assert torch.equal(weights[-1]["blocks.0.ffn.0.up.weight"], torch.cat([up, up]))
    rows = (wider.folder / "whole" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [row["freezer/eval"] for row in map(json.loads, rows) if "freezer/eval" in row]
    of_ffn, of_new_ffn, of_attention = found[3], found[5], found[6] - found[5]
    assert found[:7] == [0, 0, 0, of_ffn, of_ffn, of_new_ffn, of_new_ffn + of_attention]
    assert of_new_ffn == of_ffn + 2 and of_attention
    down = [any("0.ffn.0.down" in key for key in state) for state in states]
    assert down[:8] == [False] * 6 + [True] * 2


def test_the_manifest_tells_of_a_switch_at_once(wider: Experiment, in_children, killer) -> None:
    saving = {"training.save_every_steps": 1}
    assert in_children(lambda: wider.train("killed", killer(EPOCH + 1), changes=saving)) == [-9]
    manifest = json.loads((wider.folder / "killed" / "manifest.json").read_text(encoding="utf-8"))
    assert [(s["plugin"], s["epoch"]) for s in manifest["switches"]] == [("wider", 2)]
    assert manifest["timeline"][0]["event"] == "enabled"


def test_a_checkpoint_of_after_the_switch_needs_the_plugin(
    wider: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    wider.train("run", stop_at_step=EPOCH + 2)
    with pytest.raises(ConfigError, match=r"plugin wider has changed .*--plugin wider"):
        wider.train("run", "no:wider", resume=True)
    wider.files = ()
    wider.plugin("wider", WIDER.replace("origins = {}", "return None"))
    with pytest.raises(CheckpointError, match=r"wider changed the structure .* does not do so now"):
        wider.train("run", resume=True)


def test_a_compiled_model_is_compiled_anew(wider: Experiment, monkeypatch) -> None:
    compiled: list[Any] = []

    def compile_(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    run = wider.train("run", changes={"training.compile": True})
    # What trains, what evaluates and what has other weights, of the old model and the new one.
    models = [inspect.getclosurevars(function).nonlocals["model"] for function in compiled]
    assert [id(model) for model in models] == [id(models[0])] * 3 + [id(models[3])] * 3
    assert models[0] is not models[3]
    assert run.result.status == "finished"


def test_an_average_is_dropped_with_its_plugin(wider: Experiment) -> None:
    wider.plugin("teacher", TEACHER)
    wider.train("run", stop_at_step=EPOCH + 2)
    wider.train("run", "no:teacher", resume=True)
    assert "holds an average of plugin teacher, which is not active" in wider.log("run")
    assert not list(wider.checkpoints()[-1].glob("average-*"))


def test_an_average_follows_the_weights_while_its_plugin_is_enabled(wider: Experiment) -> None:
    del wider.settings["schedules.enable_wider_at_epoch"]
    wider.files = ()
    wider.plugin("teacher", TEACHER)
    weights: list[torch.Tensor] = []
    averages: list[torch.Tensor] = []

    class Watches:
        @hookimpl(priority=0)
        def on_step_start(self, trainer: Trainer) -> None:
            name, parameter = next(iter(trainer.model.named_parameters()))
            weights.append(parameter.detach().clone())
            averages.append(trainer.averages["teacher"].values[name].clone())

    wider.train("run", Watches(), strict=True)
    expected = weights[0]
    for step in range(1, len(weights)):
        decay = 0.9 + 0.001 * step
        expected = decay * expected + (1 - decay) * weights[step]
        torch.testing.assert_close(averages[step], expected, rtol=0, atol=1e-6)
