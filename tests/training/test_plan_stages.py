"""The dry run of a curriculum: what the model is, takes and costs from each of its moments on."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from apt_core.kernel import Kernel, boot
from apt_core.modeling.costs import model_cost
from apt_core.modeling.structure import structure_after
from apt_core.planning import calibration
from apt_core.planning.calibration import Calibration
from apt_core.planning.footprint import CountedAllocations, Footprint
from apt_core.planning.memory import estimate, out_of_memory_advice, switch_memory
from apt_core.planning.plan import make_plan, print_plan
from apt_core.planning.stages import stages
from apt_core.types import PluginCosts

CPU = torch.device("cpu")

WIDER = '''
"""A second feed-forward beside that of every second layer, of which a token uses a quarter."""

from apt_core import PluginCosts, hookimpl

HIDDEN = 64


@hookimpl
def apt_transform_model(model):
    import torch
    from torch import nn

    from apt_core.modeling import Carried, ModelTransform

    class Wider(nn.Module):
        def __init__(self, first, width):
            super().__init__()
            self.first = first
            self.up = nn.Parameter(torch.empty(HIDDEN, width))
            self.down = nn.Parameter(torch.empty(width, HIDDEN))

        def init_parameter(self, name, tensor, generator, *, num_layers):
            if name in ("up", "down"):
                tensor.fill_(0.0 if name == "down" else 0.1)
            return name in ("up", "down")

        def forward(self, x):
            return self.first(x) + torch.relu(x @ self.up.T) @ self.down.T

    origins, shares, added = {}, {}, 0
    for index, block in enumerate(model.blocks):
        if index % 2:
            path = f"blocks.{index}.ffn"
            for name, _ in block.ffn.named_parameters():
                origins[f"{path}.first.{name}"] = Carried(f"{path}.{name}")
            block.ffn = Wider(block.ffn, model.d_model)
            shares |= {f"{path}.up": 0.25, f"{path}.down": 0.25}
            added += 2 * 2 * HIDDEN * model.d_model
    return ModelTransform(model, origins, active_share=shares, added_flops=added)
'''

TEACHER = """
from apt_core import PluginCosts, hookimpl


@hookimpl
def apt_costs(config):
    return PluginCosts(averages=1, forwards=1)
"""

LAYERS, WIDTH, HIDDEN = 2, 32, 64
MORE = {"num_layers": 6}
"""Of more layers not all are measured."""

ADDED_PARAMS = LAYERS // 2 * 2 * HIDDEN * WIDTH
ADDED_FLOPS = 3 * 2 * ADDED_PARAMS


SCHEDULES = {
    "enable_wider_at_epoch": 2,
    "enable_teacher_at_epoch": 3,
    "disable_teacher_at_epoch": 4,
}


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SECONDS", 0.005)


@pytest.fixture
def kernel_of(tmp_path: Path) -> Callable[..., Kernel]:
    """A kernel of a curriculum: wider at epoch 2, a teacher from 3 to 4."""

    def make(wider: str = WIDER, files: bool = True, **sections: Any) -> Kernel:
        for name, source in (("wider", wider), ("teacher", TEACHER)):
            (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        model = {
            "attention_name": "mha", "d_model": WIDTH, "num_heads": 4, "d_ff": 48,
            "num_layers": LAYERS, "max_seq_len": 16, **sections.pop("model", {}),
        }  # fmt: skip
        profile = {
            "plugins": [str(tmp_path / "wider.py"), str(tmp_path / "teacher.py")],
            "model": model,
            "training": {"batch_size": 4, "max_epochs": 5, **sections.pop("training", {})},
            "schedules": SCHEDULES,
            "hardware": {"device": "cpu", **sections.pop("hardware", {})},
            **sections,
        }
        return boot(profile, files=files)

    return make


def printed(plan: dict[str, Any]) -> str:
    stream = io.StringIO()
    print_plan(Console(file=stream, width=100, highlight=False, soft_wrap=True), plan)
    return stream.getvalue()


def by_name(plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {stage["name"]: stage for stage in plan["stages"]}


def test_stages_come_in_the_order_of_the_run_whatever_their_units(kernel_of) -> None:
    text = {"source": "pydoc"}
    plan = make_plan(kernel_of(data=text), world_size=1)
    steps, tokens = (plan["batch"][key] for key in ("steps_per_epoch", "tokens_per_epoch"))
    schedules = {"enable_wider_at_step": 2 * steps, "enable_teacher_at_token": tokens // 2}
    plan = make_plan(kernel_of(data=text, schedules=schedules), world_size=1)
    assert [*by_name(plan)] == ["start", "enable teacher", "enable wider"]


def test_a_stage_that_the_run_does_not_reach_is_no_stage_and_is_said_to_be_inactive(
    kernel_of,
) -> None:
    kernel = kernel_of(data={"source": "pydoc"}, training={"max_steps": 20})
    plan = make_plan(kernel, world_size=1)
    assert [*by_name(plan)] == ["start"]
    assert {entry["key"] for entry in plan["inactive_keys"]} == {
        "schedules.enable_wider_at_epoch",
        "schedules.enable_teacher_at_epoch",
    }


# Parameters and arithmetic


def test_a_stage_has_the_parameters_and_flops_of_its_own_structure(kernel_of) -> None:
    plan = make_plan(kernel_of())
    found = by_name(plan)
    assert list(found) == ["start", "enable wider", "enable teacher", "disable teacher"]
    assert [stage["epoch"] for stage in plan["stages"]] == [1, 2, 3, 4]
    start, wider = found["start"], found["enable wider"]
    assert start["params_active"] == start["params_total"]
    assert wider["params_total"] == start["params_total"] + ADDED_PARAMS
    assert wider["params_active"] == start["params_total"] + ADDED_PARAMS // 4
    assert wider["flops_per_token"] == start["flops_per_token"] + ADDED_FLOPS
    assert found["disable teacher"]["params_total"] == wider["params_total"]


def test_what_a_plugin_computes_beside_the_model_counts_while_it_is_enabled(kernel_of) -> None:
    found = by_name(make_plan(kernel_of()))
    teacher = found["enable teacher"]
    assert teacher["plugin_flops_per_token"] == teacher["flops_per_token"] // 3
    assert found["enable wider"]["plugin_flops_per_token"] == 0
    assert found["disable teacher"]["plugin_flops_per_token"] == 0
    averages = {name: stage["memory"]["ema"] for name, stage in found.items()}
    weights = 4 * teacher["params_total"]
    assert averages == {
        "start": 0, "enable wider": 0, "enable teacher": weights, "disable teacher": 0,
    }  # fmt: skip
    activations = {name: stage["memory"]["activations"] for name, stage in found.items()}
    logits = 4 * 16 * 256 * 4
    assert activations["enable teacher"] >= activations["enable wider"] + logits
    assert activations["disable teacher"] == activations["enable wider"] > activations["start"]


def test_the_arithmetic_that_a_transform_adds_is_that_of_the_layers_which_it_changes(
    kernel_of,
) -> None:
    kernel = kernel_of()
    first, wider, *_ = (stage.structure for stage in stages(kernel, kernel.schedule))
    before, after = (s.layer_flops(kernel, 16) for s in (first, wider))
    each = ADDED_FLOPS / (LAYERS // 2)
    assert [b - a for a, b in zip(before, after, strict=True)] == [0.0, each] * (LAYERS // 2)


def test_a_plugin_that_changes_the_model_from_the_start_does_so_in_the_first_stage(
    kernel_of,
) -> None:
    dense = by_name(make_plan(kernel_of()))["start"]["params_total"]
    (only,) = make_plan(kernel_of(schedules={}))["stages"]
    assert only["params_total"] == dense + ADDED_PARAMS


# Memory


def real_activations(kernel: Kernel, model: nn.Module, teacher: bool) -> int:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with CountedAllocations() as counted:
        ids = torch.zeros(4, 16, dtype=torch.int64)
        output = model(ids)
        loss = nn.functional.cross_entropy(
            output.logits.flatten(0, 1).float(), ids.flatten(), reduction="sum"
        )
        if teacher:
            with torch.no_grad():
                target = model(ids)
        loss = loss / ids.numel()
        loss.backward()
        del output, loss
        if teacher:
            del target
    return counted.peak


@pytest.mark.parametrize(
    ("costs", "teacher"), [((), False), pytest.param((0, 1), True, marks=pytest.mark.long)]
)
def test_activations_of_a_changed_structure_are_those_of_it_in_real_memory(
    kernel_of, costs, teacher
) -> None:
    kernel = kernel_of(model=MORE)
    structure = structure_after(kernel, ["wider"])
    expected = Footprint(kernel, CPU, structure, PluginCosts(*costs)).activations(4)
    real = structure.to_empty(device="cpu")
    for module in real.modules():
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()
    for parameter in real.parameters():
        nn.init.zeros_(parameter)
    assert real_activations(kernel, real.train(), teacher) == expected


def test_memory_of_a_stage_is_divided_over_the_processes_as_that_of_the_start_is(
    kernel_of,
) -> None:
    kernel = kernel_of(hardware={"num_gpus": 4, "distributed": "fsdp"})
    for stage in make_plan(kernel)["stages"]:
        memory = stage["memory"]
        assert (memory["world_size"], memory["sharding"]) == (4, "fsdp")
        assert memory["gradients"] == stage["params_total"] * 4 // 4


def test_the_moment_of_the_switch_has_the_state_of_both_structures(kernel_of) -> None:
    kernel = kernel_of(training={"ema_decay": 0.9})
    plan = make_plan(kernel)
    found = by_name(plan)
    old, new = (
        Footprint(kernel, structure=structure_after(kernel, plugins)) for plugins in ([], ["wider"])
    )
    before, after = estimate(old), estimate(new)
    lasting = before.parameters + before.optimizer + before.ema + before.snapshot
    # A rule makes a parameter beside its place, and the state of what stays is taken over: of all
    # but the feed-forwards of every second layer. There are no gradients.
    largest, moved = 4 * HIDDEN * WIDTH, LAYERS // 2 * 3 * 48 * WIDTH * 4
    kept = before.optimizer * (before.gradients - moved) // before.gradients
    made = after.parameters + after.optimizer - kept + after.ema + largest
    assert new.trial(4) < made - after.parameters
    expected = lasting + made
    assert found["enable wider"]["switch_memory"] == expected
    assert switch_memory(old, new, before, after) == expected
    others = [stage["switch_memory"] for name, stage in found.items() if name != "enable wider"]
    assert others == [None] * 3
    assert "switch (enable wider): " in printed(plan)


def test_a_switch_that_computes_much_takes_what_its_trial_takes(kernel_of) -> None:
    kernel = kernel_of(training={"batch_size": 64})
    old, new = (
        Footprint(kernel, structure=structure_after(kernel, plugins)) for plugins in ([], ["wider"])
    )
    before, after = estimate(old), estimate(new)
    lasting = before.parameters + before.optimizer + before.snapshot
    logits = 64 * 16 * 256 * 4
    assert new.trial(64) > logits
    assert switch_memory(old, new, before, after) == lasting + after.parameters + new.trial(64)


def test_running_out_of_memory_after_a_switch_is_judged_by_the_new_structure(kernel_of) -> None:
    kernel = kernel_of(model={"d_model": 256}, hardware={"device": "cuda"})
    for record in kernel.manager.records.values():
        record.state = "dormant"
    needed = [
        out_of_memory_advice(kernel, 1, "none", 2**18, switched_by=plugins)
        for plugins in ([], ["wider"])
    ]
    assert needed[0] != needed[1]


# Time


def test_an_epoch_takes_its_steps_and_evaluations_at_the_measured_speed(
    kernel_of, monkeypatch
) -> None:
    monkeypatch.setattr(
        Calibration, "speed", lambda self, structure: calibration.Speed(1e9, 1e-6, "a made-up one")
    )
    kernel = kernel_of(evaluation={"eval_freq": 100, "eval_batches": 2})
    plan = make_plan(kernel)
    batch, found = plan["batch"], by_name(plan)
    steps = batch["steps_per_epoch"]
    held_out = batch["evaluated_tokens_per_epoch"] - (steps - 1) // 100 * 2 * 4 * 16
    assert 0 < held_out < batch["tokens_per_epoch"] / 8
    for name, stage in found.items():
        flops, extra = stage["flops_per_token"], stage["plugin_flops_per_token"]
        tokens = batch["tokens_per_epoch"]
        step = (flops + extra) * 64e-9 + stage["params_total"] * 1e-6
        seconds = tokens / 64 * step + batch["evaluated_tokens_per_epoch"] * flops / 3e9
        assert stage["seconds_per_epoch"] == pytest.approx(seconds, rel=0.01), name
        assert stage["seconds_per_million_tokens"] == pytest.approx(step / 64 * 1e6, rel=0.01)
    assert "timed: a made-up one" in printed(plan)


def test_the_measured_speed_is_that_of_the_structure_with_all_that_fits(
    kernel_of, monkeypatch
) -> None:
    kernel = kernel_of(model=MORE)
    cost = model_cost(kernel)
    first, wider, *_ = (stage.structure for stage in stages(kernel, kernel.schedule))
    timing = Calibration(kernel, CPU, cost)
    for structure in (first, wider):
        speed = timing.speed(structure)
        assert speed.measured == "the whole model"
        assert 1e6 < speed.flops_per_s < 1e13 and 1e-13 < speed.optimizer_s < 1e-3
        assert all(p.is_meta for p in structure.model.parameters())
    layer = sum(p.numel() for p in wider.model.blocks[-1].parameters())
    for fitting, words in (
        (2 * layer, "2 of 6 layers"),
        (layer, "a layer of the model at the start"),
        (layer // 3, "a layer of the model at the start, at 1/2 of its width"),
    ):
        monkeypatch.setattr(calibration, "CPU_BYTES", 16 * fitting)
        timing = Calibration(kernel, CPU, cost)
        assert timing.speed(wider).measured == words
        assert timing.notes == []


def test_a_measurement_that_fails_leaves_the_time_unknown_and_says_why(
    kernel_of, monkeypatch
) -> None:
    def fail(self: Any, subject: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(Calibration, "_timed", fail)
    plan = make_plan(kernel_of())
    assert {stage["seconds_per_epoch"] for stage in plan["stages"]} == {None}
    assert plan["notices"] == ["time: could not be measured: RuntimeError: no room"]
    assert "unknown" in printed(plan)


def test_processes_on_one_cpu_share_its_cores(kernel_of, monkeypatch) -> None:
    monkeypatch.setattr(calibration.os, "sched_getaffinity", lambda pid: set(range(4)))
    kernel = kernel_of(hardware={"num_threads": 2})
    timing = Calibration(kernel, CPU, model_cost(kernel))
    assert [timing.slowdown(n) for n in (1, 2, 4)] == [1.0, 1.0, 2.0]
    timing.device = torch.device("cuda")
    assert timing.slowdown(8) == 1.0


# What is not there


def test_what_this_machine_lacks_is_named_and_the_plan_is_made_all_the_same(
    kernel_of, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    kernel = kernel_of(
        files=False,
        hardware={"device": "cuda", "num_gpus": 4, "distributed": True},
        data={"train_path": "gone.jsonl", "val_path": "gone too.jsonl"},
    )
    plan = make_plan(kernel)
    assert [row["key"] for row in plan["missing"]] == [
        "data.train_path", "data.val_path", "hardware.num_gpus", "hardware.device",
    ]  # fmt: skip
    stage = plan["stages"][0]
    assert stage["memory"]["world_size"] == 4
    assert stage["seconds_per_epoch"] is None and stage["seconds_per_million_tokens"] > 0
    assert plan["calibration"]["is_the_runs_device"] is False
    text = printed(plan)
    assert "missing here: data.train_path: there is no file 'gone.jsonl'" in text
    assert "missing here: hardware.device: cuda not usable" in text
    assert "1M tokens" in text and "not the profile's device" in text


def test_nothing_is_missing_where_everything_is_there(kernel_of) -> None:
    plan = make_plan(kernel_of())
    assert plan["missing"] == [] and plan["calibration"]["is_the_runs_device"]
    # The folder of this test, which has the word in its name, is among the paths.
    assert "missing here" not in printed(plan)


# Plugins that fail


def test_a_transform_that_fails_leaves_the_plan_of_a_run_without_it(kernel_of) -> None:
    plan = make_plan(kernel_of(WIDER.replace("return ModelTransform", "raise OSError  #")))
    totals = {stage["params_total"] for stage in plan["stages"]}
    assert totals == {plan["stages"][0]["params_active"]}
    (row,) = (row for row in plan["plugins"] if row["name"] == "wider")
    assert row["state"] == "quarantined" and "OSError" in row["reason"]


def test_a_setting_that_a_transform_refuses_is_bad_input_before_anything_trains(
    apt_train, tmp_path
) -> None:
    refusing = WIDER.replace(
        "    import torch\n",
        "    import torch\n    from apt_core import ConfigError\n"
        "    raise ConfigError('wider.size: too wide')\n",
        1,
    )
    path = tmp_path / "wider.py"
    path.write_text(refusing, encoding="utf-8")
    later = ("--schedules.enable_wider_at_epoch", "2", "--training.max_epochs", "3")
    for more in ((), ("--dry-run",)):
        run = apt_train("--plugin", str(path), *later, *more)
        assert run.code == 2 and "wider.size: too wide" in run.err


def test_costs_of_another_type_are_a_failure_of_the_plugin(kernel_of, tmp_path) -> None:
    kernel = kernel_of()
    (tmp_path / "odd.py").write_text(
        "from apt_core import hookimpl\n\n@hookimpl\ndef apt_costs():\n    return 3\n"
    )
    kernel = boot(kernel.config, plugins=[str(tmp_path / "odd.py")])
    make_plan(kernel)
    (failure,) = kernel.manager.records["odd"].failures
    assert failure.hook == "apt_costs" and "int, not PluginCosts" in failure.error


# JSON


def test_the_json_has_every_stage(apt_train, tmp_path) -> None:
    path = tmp_path / "wider.py"
    path.write_text(WIDER, encoding="utf-8")
    planned = apt_train(
        "--plugin", str(path), "--schedules.enable_wider_at_step", "2", "--dry-run", "--json"
    )
    start, wider = json.loads(planned.out)["stages"]
    assert (start["step"], wider["step"], wider["name"]) == (None, 2, "enable wider")
    assert wider["switch_memory"] > 0 and wider["seconds_per_epoch"] > 0
