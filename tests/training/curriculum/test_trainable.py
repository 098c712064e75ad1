"""Parameters are frozen and thawed by stages: as in a loop that adds them to its optimizer by hand,
over a resume, through a switch to experts, and recorded."""

from __future__ import annotations

import copy
import itertools
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from apt_core import TrainableStage, hookimpl
from apt_core.config import Config
from apt_core.errors import ConfigError
from apt_core.modeling.calling import forward_batch
from apt_core.modeling.cross_entropy import cross_entropy_sum
from apt_core.optim.optimizers.muon import MuonProvider
from apt_core.optim.parameter_groups import hidden_matrices
from apt_core.runs import open_run
from apt_core.runs.checkpoint import list_checkpoints
from apt_core.testing import TinyRun, tiny_run

STEPS = 11
STAGES = [
    {"freeze": ["*"], "thaw": ["final_norm", "blocks.2"]},
    {"at_step": 3, "thaw": ["blocks.1"]},
    {"at_epoch": 2, "thaw": ["*"]},
    {"at_step": 8, "freeze": ["embedding"]},
    {"at_step": 10, "thaw": ["embedding"]},
]
CHANGES: dict[int, tuple[list[str], list[str]]] = {
    1: ([], ["final_norm", "blocks.2"]),
    3: ([], ["blocks.1"]),
    6: ([], ["embedding", "blocks.0"]),
    8: (["embedding"], []),
    10: ([], ["embedding"]),
}
"""What a loop by hand takes out of its optimizer, and puts into it; an epoch has five steps."""

SETTINGS: dict[str, Any] = {
    "model.num_layers": 3,
    "trainable.stages": STAGES,
    "training.max_epochs": 3,
    "training.max_steps": STEPS,
    "training.batch_size": 5,
    "training.grad_accum_steps": 2,
    "training.log_every_steps": 1,
    "training.learning_rate": 0.01,
    "training.scale_lr_by_width": False,
    "training.weight_decay": 0.1,
    "training.warmup_steps": 3,
    "training.gradient_clip": 0.5,
    "training.ema_decay": 0.9,
    "training.save_every_steps": 1,
    "training.keep_last": 0,
    "evaluation.eval_freq": 2,
    "evaluation.sample_tokens": 0,
    "hardware.num_threads": 1,
}
PLUGIN = "apt_plugins.trainable.plugin"


class Watch:
    """What a loop by hand needs of the run: the first weights, and the batches and rates of each
    step."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.batches: list[Any] = []
        self.rates: list[float] = []
        self.order: list[str] = []

    @hookimpl
    def on_training_start(self, trainer: Any) -> None:
        self.model = copy.deepcopy(trainer.model)
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        groups = trainer.optimizer.param_groups
        self.order = [names[id(p)] for group in groups for p in group["params"]]

    @hookimpl
    def on_step_start(self, batch: Any) -> None:
        self.batches.append(list(batch))

    @hookimpl
    def on_step_end(self, trainer: Any) -> None:
        group = trainer.optimizer.param_groups[0]
        self.rates.append(group["lr"] / group["initial_lr"])


def train(folder: Path, *plugins: Any, **options: Any) -> TinyRun:
    changes = options.pop("changes", {})
    return tiny_run(PLUGIN, *plugins, overrides={**SETTINGS, **changes}, output=folder, **options)


def adamw(groups: list[dict[str, Any]]) -> Optimizer:
    return AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True)


def muon(groups: list[dict[str, Any]]) -> Optimizer:
    return MuonProvider({}).create(groups, learning_rate=0.01, weight_decay=0.1)


def groups_of(model: nn.Module, names: list[str], separates: bool) -> Iterator[dict[str, Any]]:
    matrices = hidden_matrices(model) if separates else {}
    for name in names:
        parameter = model.get_parameter(name)
        if name in matrices:
            yield {"params": [parameter], "hidden_matrices": True, "stacked": matrices[name]}
        else:
            decay = 0.1 if parameter.ndim >= 2 else 0.0
            yield {"params": [parameter], "lr": 0.01, "weight_decay": decay}


def by_hand(watch: Watch, make: Callable[..., Optimizer]) -> Iterator[dict[str, Tensor]]:
    """The weights after each step of a loop whose optimizer has what is trained, and no more."""
    model, separates = watch.model, make is muon
    assert model is not None
    model.requires_grad_(False)
    optimizer: Any = None
    for step, (batches, rate) in enumerate(zip(watch.batches, watch.rates, strict=True), start=1):
        for path in CHANGES.get(step, ([], []))[0]:
            for parameter in model.get_submodule(path).requires_grad_(False).parameters():
                optimizer.state.pop(parameter)
                kept = [g for g in optimizer.param_groups if g["params"][0] is not parameter]
                optimizer.param_groups[:] = kept
        for path in CHANGES.get(step, ([], []))[1]:
            model.get_submodule(path).requires_grad_(True)
            names = [n for n, _ in model.named_parameters() if n.startswith(f"{path}.")]
            groups = [*groups_of(model, names, separates)]
            if optimizer is None:
                first = [*groups_of(model, ["blocks.2.ffn.up.weight"], separates)]
                optimizer = make(first)
                groups = [g for g in groups if g["params"][0] is not first[0]["params"][0]]
            for group in groups:
                known = {id(p) for g in optimizer.param_groups for p in g["params"]}
                if id(group["params"][0]) in known:
                    continue
                if group.get("hidden_matrices"):
                    group = {**group, "lr": 0.02, "weight_decay": 0.0}
                optimizer.add_param_group(group)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * rate
        model.zero_grad()
        targets = sum(batch.num_targets for batch in batches)
        for batch in batches:
            cross_entropy_sum(forward_batch(model, model, batch), batch.targets).backward(
                torch.tensor(1 / targets)
            )
        learning = [model.get_parameter(name) for name in watch.order]
        gradients = [p.grad for p in learning if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        if norm > 0.5:
            torch._foreach_mul_(gradients, 0.5 / norm)
        optimizer.step()
        yield {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module", params=["adamw", "muon"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, Path, Watch]:
    folder, watch = tmp_path_factory.mktemp(request.param) / "whole", Watch()
    train(folder, watch, changes={"training.optimizer_name": request.param})
    return request.param, folder, watch


def saved(folder: Path, part: str = "model") -> list[dict[str, Tensor]]:
    paths = list_checkpoints(folder / "checkpoints")
    return [load_file(path / f"{part}.safetensors") for path in paths]


def test_it_learns_as_in_a_loop_that_adds_parameters_to_its_optimizer(
    whole: tuple[str, Path, Watch],
) -> None:
    """AdamW to the bit; Muon orthogonalises matrices of one shape at once, which rounds otherwise
    where they are fewer."""
    optimizer, folder, watch = whole
    expected = [*by_hand(copy.copy(watch), muon if optimizer == "muon" else adamw)]
    found = saved(folder)
    assert len(found) == len(expected) == STEPS
    for step, (theirs, ours) in enumerate(zip(expected, found, strict=True), start=1):
        for name, weight in theirs.items():
            if optimizer == "adamw":
                assert ours[name].equal(weight), (step, name)
            else:
                torch.testing.assert_close(ours[name], weight, rtol=1e-6, atol=1e-7)
    states = [{key.partition("//")[0] for key in state} for state in saved(folder, "optimizer")]
    has = ["embedding.weight" in state for state in states]
    assert has == [False] * 5 + [True] * 2 + [False] * 2 + [True] * 2
    assert [any("blocks.1" in n for n in state) for state in states] == [False] * 2 + [True] * 9
    last = saved(folder, "optimizer")[-1]
    steps = {key.partition("//")[0]: int(v) for key, v in last.items() if key.endswith("//step")}
    norms = [f"blocks.{n}.ffn_norm.weight" for n in range(3)]
    # Each has its own count, and that of what was frozen again begins anew.
    assert [steps[name] for name in ("embedding.weight", *norms)] == [2, 6, 9, 11]
    averages = saved(folder, "ema")
    assert averages[4]["embedding.weight"].equal(found[0]["embedding.weight"])


def test_a_run_that_is_killed_near_a_stage_goes_on_to_the_bit(
    whole: tuple[str, Path, Watch], in_children: Any, killer: Any, differences: Any
) -> None:
    """Killed in the step after steps, before and after stages; AdamW's in more places."""
    optimizer, folder, _ = whole
    changes = {"training.optimizer_name": optimizer}
    path = folder.with_name("killed")
    for n in (2, 3, 8) if optimizer == "adamw" else (2,):
        kill = killer(n, micro=1)
        part = partial(train, path, Watch(), kill, changes=changes, resume=path.exists())
        assert in_children(part) == [-signal.SIGKILL]
    train(path, Watch(), changes=changes, resume=True)
    assert differences(folder, path) == []


def test_what_is_frozen_and_thawed_is_recorded(whole: tuple[str, Path, Watch]) -> None:
    _, folder, _ = whole
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    told = [
        (row["kind"], row["step"], row["parts"], row["plugin"])
        for row in rows
        if row["kind"] in ("frozen", "thawed")
    ]
    assert told == [
        ("frozen", 1, ["embedding", "blocks.0-1"], "trainable"),
        ("thawed", 3, ["blocks.1"], "trainable"),
        ("thawed", 6, ["embedding", "blocks.0"], "trainable"),
        ("frozen", 8, ["embedding"], "trainable"),
        ("thawed", 10, ["embedding"], "trainable"),
    ]
    log = (folder / "log.txt").read_text(encoding="utf-8")
    assert "step 10: 4,096 parameters are thawed: embedding (" in log
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    stages = manifest["trainable"]
    assert [stage["step"] for stage in stages] == [1, 3, 6, 8, 10]
    assert stages[-1]["trained"] == manifest["parameters"]
    assert stages[3]["frozen_parameters"] == 4096 == stages[2]["trained"] - stages[3]["trained"]
    session = open_run(folder, step=4, plugins=["no:watch"])
    assert session.model.get_parameter("embedding.weight").equal(
        saved(folder)[3]["embedding.weight"]
    )


def test_stages_act_before_and_after_a_switch_to_experts(
    tmp_path: Path, in_children: Any, killer: Any, differences: Any
) -> None:
    """Experts of what is frozen are frozen; their router, which is new, learns."""
    stages = [
        {"freeze": ["blocks.0-1", "embedding"]},
        {"at_step": 5, "thaw": ["blocks.1.ffn.experts"]},
        {"at_step": 6, "freeze": ["router"]},
        {"at_step": 7, "thaw": ["blocks.0.ffn.experts", "blocks.*.attention"]},
    ]
    changes = {
        "trainable.stages": stages,
        "training.max_steps": 8,
        "model.moe.experts": 2,
        "model.moe.top_k": 1,
        "schedules.enable_moe_at_step": 4,
    }

    def run(name: str, *plugins: Any, **options: Any) -> Path:
        train(tmp_path / name, "apt_plugins.moe.plugin", *plugins, changes=changes, **options)
        return tmp_path / name

    folder = run("whole")
    weights = saved(folder)

    def moved(name: str) -> list[int]:
        pairs = enumerate(itertools.pairwise(weights[3:]), start=5)
        return [step for step, (before, now) in pairs if not before[name].equal(now[name])]

    # The rate of the last step is 0.
    assert moved("blocks.0.ffn.experts.up") == moved("blocks.0.attention.qkv_weight") == [7]
    assert moved("blocks.1.ffn.experts.up") == [5, 6, 7]
    assert moved("blocks.0.ffn.router.weight") == [5]
    assert moved("embedding.weight") == []
    for n in (3, 6):
        part = partial(run, "killed", killer(n, micro=1), resume=n > 3)
        assert in_children(part) == [-signal.SIGKILL]
    assert differences(folder, run("killed", resume=True)) == []


class ByHand:
    """A plugin that freezes and thaws by itself, beside a stage of its own."""

    @hookimpl
    def apt_trainable(self, config: Config) -> list[TrainableStage]:
        return [TrainableStage(freeze=["blocks.0"]), TrainableStage(thaw=["blocks.0"], at=4)]

    @hookimpl
    def on_step_start(self, step: int, trainer: Any) -> None:
        trainer.model.embedding.requires_grad_(step % 2 == 1)


def test_what_plugins_freeze_by_themselves_keeps_its_state_and_is_told_once(
    tmp_path: Path, differences: Any
) -> None:
    changes = {"trainable.stages": [], "training.max_steps": 6}
    folder = tmp_path / "whole"
    train(folder, ByHand(), changes=changes)
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    told = [
        (row["kind"], row["step"], row["parts"], row["plugin"])
        for row in rows
        if row["kind"] in ("frozen", "thawed")
    ]
    assert told == [
        ("frozen", 1, ["blocks.0"], "byhand"),
        ("frozen", 2, ["embedding"], ""),
        ("thawed", 4, ["blocks.0"], "byhand"),
        ("frozen", 4, ["embedding"], ""),
    ]
    steps = [state["embedding.weight//step"].item() for state in saved(folder, "optimizer")]
    assert steps == [1, 1, 2, 2, 3, 3]
    part = tmp_path / "part"
    train(part, ByHand(), changes=changes, stop_at_step=4)
    train(part, ByHand(), changes=changes, resume=True)
    assert differences(folder, part) == []


def test_a_checkpoint_goes_on_with_the_stages_that_it_had(tmp_path: Path) -> None:
    train(tmp_path / "run", stop_at_step=2)
    other: Mapping[str, Any] = {"trainable.stages": [*STAGES[:1], {"at_step": 4, "thaw": ["*"]}]}
    with pytest.raises(ConfigError, match=r"trainable\.stages.*how the weights train"):
        train(tmp_path / "run", changes=other, resume=True)
    without = {key: value for key, value in SETTINGS.items() if key != "trainable.stages"}
    with pytest.raises(ConfigError, match=r"trainable: .*how the weights train"):
        tiny_run(overrides=without, output=tmp_path / "run", resume=True)
