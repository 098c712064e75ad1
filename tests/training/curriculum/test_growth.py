"""Runs whose model grows: to the bit on either side, in two processes, with experts before or
after, opened and planned."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_core.errors import ConfigError
from apt_core.kernel import boot
from apt_core.modeling.costs import model_cost
from apt_core.modeling.plain import plain_model
from apt_core.planning.calibration import Calibration
from apt_core.planning.stages import stages
from apt_core.runs.checkpoint import list_checkpoints
from apt_core.runs.opened import open_run
from apt_core.testing import TINY_PROFILE, TinyRun, tiny_run
from apt_core.testing.tiny import TEXT

pytestmark = pytest.mark.long

SETTINGS: dict[str, Any] = {
    "model.num_layers": 2,
    "model.dropout": 0.1,
    "model.moe.experts": 4,
    "growth.d_model": 24,
    "growth.d_ff": 40,
    "growth.num_layers": 3,
    "growth.vocab_size": 260,
    "training.ema_decay": 0.9,
    "training.max_steps": 9,
    "training.log_every_steps": 1,
    "training.keep_last": 0,
    "training.grad_accum_steps": 2,
    "evaluation.eval_freq": 0,
    "evaluation.sample_tokens": 4,
    "hardware.num_threads": 1,
    "schedules.enable_growth_at_step": 4,
    "schedules.enable_moe_at_step": 7,
}
EXPERTS_FIRST = {"schedules.enable_growth_at_step": 7, "schedules.enable_moe_at_step": 4}
SAVING = {"training.save_every_steps": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "growth": {"training.optimizer_name": "muon"},
    "experts": {**EXPERTS_FIRST, "growth.new_blocks": "initial"},
}


@dataclass
class Growing:
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def train(self, name: str, *plugins: Any, changes: Any = (), **options: Any) -> TinyRun:
        return tiny_run(
            "apt_plugins.growth.plugin",
            "apt_plugins.moe.plugin",
            *plugins,
            profile=self.profile,
            overrides={**SETTINGS, **self.settings, **dict(changes)},
            output=self.folder / name,
            **options,
        )

    @property
    def profile(self) -> dict[str, Any]:
        text = self.folder / "text.txt"
        text.write_text(TEXT, encoding="utf-8")
        return {**copy.deepcopy(TINY_PROFILE), "data": {"train_path": str(text)}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Growing, TinyRun]]:
    made: dict[str, tuple[Growing, TinyRun]] = {}

    def get(variant: str) -> tuple[Growing, TinyRun]:
        if variant not in made:
            growing = Growing(tmp_path_factory.mktemp(variant), VARIANTS[variant])
            made[variant] = growing, growing.train("whole", changes=SAVING)
        return made[variant]

    return get


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_grows_without_a_change_of_its_loss(whole, variant: str) -> None:
    _, run = whole(variant)
    switches = run.manifest["switches"]
    order = ["growth", "moe"] if variant == "growth" else ["moe", "growth"]
    assert [(s["plugin"], s["step"]) for s in switches] == [(order[0], 4), (order[1], 7)]
    for switch in switches:
        assert abs(switch["loss_after"] - switch["loss_before"]) < 1e-5
    shapes = {name: tuple(t.shape) for name, t in run.weights.items()}
    assert shapes["embedding.weight"] == (260, 24)
    assert shapes["blocks.2.ffn.experts.up"] == (4, 40, 24)


@pytest.mark.parametrize(("variant", "n"), [("growth", 3), ("growth", 4), ("experts", 7)])
def test_killed_and_resumed_is_in_one_go(
    whole, in_children, differences, killer, variant: str, n: int
) -> None:
    growing, run = whole(variant)
    name = f"killed-{n}"
    codes = in_children(lambda: growing.train(name, killer(n), changes=SAVING))
    assert codes == [-signal.SIGKILL]
    resumed = growing.train(name, resume=True, changes=SAVING)
    assert differences(growing.folder / "whole", growing.folder / name) == []
    for key in ("sample", "switches", "timeline"):
        assert resumed.manifest[key] == run.manifest[key]


def test_two_processes_grow_as_one_does(
    tmp_path: Path, in_children, differences, killer, ranks
) -> None:
    """The sharded one is killed just after it has grown, too."""
    in_two = {
        "model.dropout": 0.0,
        "training.batch_size": 2,
        "training.max_steps": 6,
        "training.ema_decay": 0.9,
        "schedules.enable_moe_at_step": 6,
    }
    growing = Growing(tmp_path, in_two)
    growing.train("alone", changes={"training.grad_accum_steps": 4})
    expected = run_losses(tmp_path / "alone")
    assert len(expected) == 6
    for sharding in ("ddp", "fsdp"):
        divided = {"hardware.distributed": sharding}
        run = ranks(lambda d=divided, name=sharding: growing.train(name, changes=d))
        assert in_children(*run) == [0, 0]
        assert run_losses(tmp_path / sharding) == pytest.approx(expected, rel=2e-5)
    saving = {**divided, **SAVING}
    part = ranks(lambda: growing.train("killed", killer(4), changes=saving))
    assert in_children(*part) == [-signal.SIGKILL] * 2
    part = ranks(lambda: growing.train("killed", changes=saving, resume=True))
    assert in_children(*part) == [0, 0]
    assert differences(tmp_path / "fsdp", tmp_path / "killed") == []


def run_losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_it_is_opened_at_every_size(whole) -> None:
    """Before it has grown, grown, and with experts: each checkpoint gives its own model, which
    generates, and whose plain form has its shapes."""
    growing, run = whole("experts")
    saved = {int(p.name[-8:]): p for p in list_checkpoints(growing.folder / "whole/checkpoints")}
    sizes = []
    for step in (3, 6, 9):
        session = open_run(saved[step], weights="average")
        model = session.model
        sizes.append((model.d_model, len(model.blocks), hasattr(model.blocks[0].ffn, "experts")))
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    assert sizes == [(16, 2, False), (16, 2, True), (24, 3, True)]
    for name, parameter in open_run(saved[9], weights="last").model.named_parameters():
        assert parameter.equal(run.weights[name]), name
    shape = plain_model(model, 256).shape
    assert (shape.d_model, shape.num_layers, shape.vocab_size) == (24, 3, 256)


def test_it_is_planned_at_every_size(tmp_path: Path) -> None:
    """The figures of a stage are those of a model that has its sizes from the start; experts add
    as much in either order."""
    ends = []
    for changes in ({}, EXPERTS_FIRST):
        data = Growing(tmp_path).profile
        for key, value in {**SETTINGS, **changes}.items():
            *path, last = key.split(".")
            section = data
            for part in path:
                section = section.setdefault(part, {})
            section[last] = value
        kernel = boot(data, plugins=["apt_plugins.growth.plugin", "apt_plugins.moe.plugin"])
        for kind, name in kernel.providers:
            kernel.registry.get(kind, name)
        planned = [*stages(kernel, kernel.schedule)]
        assert [stage.switches for stage in planned] == [False, True, True]
        structures = [stage.structure for stage in planned]
        costs = [model_cost(kernel, structure.config) for structure in structures]
        ends.append((structures[2], structures[2].flops_per_token(costs[2])))
        if not changes:
            assert structures[1].params == costs[1].params
            assert structures[1].flops_per_token(costs[1]) == costs[1].flops_per_token
            by_layer = structures[1].layer_flops(kernel, kernel.config.seq_len)
            assert len(by_layer) == 3 and by_layer[0] > 1.5 * costs[0].flops_per_token / 4
            timed = Calibration(kernel, torch.device("cpu"), costs[0])
            flops = timed._model_flops(structures[1])(kernel.config.seq_len)
            assert flops == costs[1].flops_per_token
    (one, flops), (other, swapped) = ends
    assert (one.params, one.active_params) == (other.params, other.active_params)
    assert flops == pytest.approx(swapped, rel=0.05)


MORE_IDS = '''
import numpy as np
from apt_core import ProviderSpec, hookimpl
from apt_core.data.tokenizers.byte import ByteTokenizer

class More(ByteTokenizer):
    """Bytes, and two ids that no text has yet."""
    name = "more"
    @property
    def vocab_size(self):
        return 258

@hookimpl
def apt_register_providers():
    return [ProviderSpec("tokenizer", "more", More, "1")]
'''


def test_a_tokenizer_may_have_the_ids_that_are_to_come(tmp_path: Path) -> None:
    """If they are there from the first step."""
    plugin = tmp_path / "more_ids.py"
    plugin.write_text(MORE_IDS, encoding="utf-8")
    growing = Growing(tmp_path, {"data.tokenizer_name": "more"})
    with pytest.raises(ConfigError, match=r"model.vocab_size: is 256 until the model grows"):
        growing.train("later", plugin)
    with pytest.raises(ConfigError, match="is 257, but tokenizer 'more' has 258 ids"):
        growing.train("few", plugin, changes={"growth.vocab_size": 257})
    growing.settings |= {"schedules.enable_growth_at_step": 1}
    run = growing.train("now", plugin)
    assert run.weights["embedding.weight"].shape[0] == 260
    assert run.manifest["switches"][0]["step"] == 1
