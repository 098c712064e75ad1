"""Two processes train as one does: losses, weights, checkpoints, what plugins are told.

All runs of two processes happen in one start of torchrun, whose processes train one after the
other; runs of one process happen in this one.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_core import hookimpl
from apt_core.data.batches import BatchPlan
from apt_core.data.order import Order, StepPlan
from apt_core.data.packing.concat import ConcatWindows
from apt_core.data.store.parts import ArrayPart
from apt_core.errors import CheckpointError, ConfigError, PluginError
from apt_core.plugin_manager import PluginManager
from apt_core.runs.tensor_files import SavedTensors
from apt_core.testing import TINY_PROFILE
from apt_core.testing.tiny import TEXT
from apt_core.training import Trainer

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
STEPS = 8
HALF = 4
LENGTH = 750
"""Characters of the text: the last step of an epoch, the sixth, has too few for two processes."""

PARTS = ("model", "optimizer", "ema")

UNEVEN = {"model__ffn_name": "probed", "training__weight_decay": 0.1}

WORKER = """
import functools, json, sys
import torch, torch.distributed as dist
from apt_core.errors import AptError
from apt_core.plugin_manager import PluginManager
from apt_core.training import Trainer
import plugins

torch.compile = functools.partial(torch.compile, backend="aot_eager")  # needs no compiler
folder, jobs = sys.argv[1], json.load(open(sys.argv[1] + "/jobs.json"))
dist.init_process_group("gloo")
for name, job in jobs.items():
    manager = PluginManager()
    told = {"rank": dist.get_rank()}
    try:
        if job["plugin"]:
            manager.register(getattr(plugins, job["plugin"])(told), job["plugin"].lower())
        if dist.get_rank() == 1:
            job["profile"]["model"].update(job["second"])
        trainer = Trainer(job["profile"], manager, **job["options"])
        result = trainer.fit()
        told.update(status=result.status, step=result.step, reason=result.reason)
        told.update(sample=result.sample, figures=result.figures)
    except AptError as error:
        told["error"] = f"{type(error).__name__}: {error}"
    told["states"] = {n: [r.state, r.reason] for n, r in manager.records.items()}
    with open(f"{folder}/{name}.{dist.get_rank()}.json", "w") as file:
        json.dump(told, file, default=str)
    dist.barrier()
dist.destroy_process_group()
"""

PLUGINS = """
import math
import torch
from torch import nn
from apt_core import ProviderSpec, StopTraining, TrainableStage, hookimpl
from apt_core.data.packing.rows import IGNORED
from apt_core.modeling.layers import SwiGLU, SwiGLUProvider

class Base:
    def __init__(self, told):
        self.told = told
        self.second = told["rank"] == 1

class Counts(Base):
    '''Which collectives step 3 has, and how often each hook is called.'''
    @hookimpl
    def on_step_start(self, step):
        if step == 3:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
    @hookimpl
    def on_step_end(self, step):
        self.count("on_step_end")
        if step == 3:
            self.profiler.stop()
            events = [event.name for event in self.profiler.events()]
            self.told["collectives"] = [name for name in events if name.startswith("c10d::")]
    def count(self, hook):
        self.told[hook] = self.told.get(hook, 0) + 1
    @hookimpl
    def on_metrics(self):
        self.count("on_metrics")
    @hookimpl
    def on_evaluation_end(self):
        self.count("on_evaluation_end")
    @hookimpl
    def on_checkpoint_saved(self):
        self.count("on_checkpoint_saved")

class StopsAlone(Base):
    @hookimpl
    def on_step_start(self, step):
        if step == 3 and self.second:
            raise StopTraining("the second has enough")

class StopsAloneAround(Base):
    @hookimpl(wrapper=True)
    def on_step_end(self, step):
        yield
        if step == 3 and self.second:
            raise StopTraining("the second has enough")

class RequestsAlone(Base):
    @hookimpl
    def on_step_end(self, step, trainer):
        if step == 3 and self.second:
            trainer.request_stop("the second has enough")

class NotFinite(Base):
    '''A loss term that is NaN at steps 2 and 3, in the second process alone.'''
    @hookimpl
    def on_step_start(self, step, trainer):
        self.step = step
        self.parameters = list(trainer.model.parameters())
        self.before = [parameter.detach().clone() for parameter in self.parameters]
    @hookimpl
    def apt_loss_terms(self, output):
        bad = self.second and self.step in (2, 3)
        return {"term": output.logits.sum() * (math.nan if bad else 0.0)}
    @hookimpl
    def on_step_end(self, step, trainer):
        same = all(old.equal(new) for old, new in zip(self.before, self.parameters))
        self.told.setdefault("still", []).append(same)
        self.told["skipped"] = trainer.trained.guard.read()[0]

class FailsAlone(Base):
    @hookimpl
    def on_step_end(self, step):
        if self.second and step < 6:
            raise RuntimeError("broken in the second")
        self.told["calls"] = self.told.get("calls", 0) + 1

class State(Base):
    @hookimpl
    def apt_state_dict(self):
        return {"of": self.told["rank"], "tensor": torch.full((2,), float(self.told["rank"]))}
    @hookimpl
    def apt_load_state_dict(self, state):
        self.told["restored"] = [state["of"], state["tensor"].tolist()]

class FreezesAlone(Base):
    @hookimpl
    def on_step_start(self, step, trainer):
        if step == 3 and self.second:
            trainer.model.get_parameter("blocks.0.ffn_norm.weight").requires_grad_(False)

class Probed(SwiGLU):
    '''With parameters that loss terms alone use, and one that nothing does.'''
    def __init__(self, d_model, d_ff, dropout=0.0):
        super().__init__(d_model, d_ff, dropout)
        self.probe = nn.Parameter(torch.full((d_model,), 0.1))
        self.rare, self.late, self.never = (nn.Parameter(torch.eye(d_model)) for _ in range(3))

    def forward(self, x):
        self.seen = {"probe": x @ self.probe, "rare": x @ self.rare, "late": x @ self.late}
        return super().forward(x)

class ProbedProvider(SwiGLUProvider):
    def create_layer(self, d_model, d_ff, dropout=0.0):
        return Probed(d_model, d_ff, dropout)

class Uneven(Base):
    '''Gradients that some micro-batches, some steps or none have; a part of the model is frozen at
    the start, another in mid-run, and thawed.'''
    @hookimpl
    def apt_register_providers(self):
        return [ProviderSpec("ffn", "probed", ProbedProvider)]

    @hookimpl
    def on_training_start(self, trainer):
        trainer.model.blocks[0].attention.requires_grad_(False)

    @hookimpl
    def on_step_start(self, step, trainer):
        self.step = step
        trainer.model.blocks[0].ffn.up.requires_grad_(step < 3)
        if step == 5:
            trainer.model.blocks[0].attention.requires_grad_(True)

    @hookimpl
    def apt_loss_terms(self, batch, trainer):
        seen = trainer.model.blocks[0].ffn.seen
        counted = batch.targets != IGNORED
        terms = {"probe": (seen["probe"][counted] - 1).square().mean()}
        if batch.num_targets and batch.input_ids[0, 0] % 12 == 1:
            self.told.setdefault("rare", []).append(self.step)
            terms["rare"] = (seen["rare"] ** 2).sum(-1)[counted].sum() / counted.sum()
        if self.step >= 4:
            terms["late"] = ((seen["late"] ** 2).mean(-1) * counted).sum() / counted.sum()
        return terms

class Staged(Base):
    @hookimpl
    def apt_trainable(self):
        return [
            TrainableStage(freeze=["embedding", "attention"]),
            TrainableStage(thaw=["attention"], at=3),
            TrainableStage(thaw=["embedding"], freeze=["ffn"], at=5),
            TrainableStage(thaw=["ffn"], at=7),
        ]

class Types(Base):
    '''Of which type a layer finds its weights and its input, and where nobody asks for autocast.'''
    @hookimpl
    def on_training_start(self, trainer):
        block = trainer.model.blocks[0]
        block.ffn.register_forward_pre_hook(self.found)
        self.norm = block.ffn_norm

    def found(self, module, arguments):
        types = [next(module.parameters()).dtype, self.norm.weight.dtype, arguments[0].dtype]
        self.told["types"] = [*map(str, types)]

    @hookimpl
    def on_evaluation_end(self, trainer):
        types = {str(parameter.dtype) for parameter in trainer.model.parameters()}
        self.told["kept"] = sorted(types)
        with torch.no_grad():
            self.told["loss"] = trainer.model(torch.arange(8)[None]).logits.float().norm().item()
        trainer.world.reshard(trainer.model)

class OfOneType(SwiGLU):
    '''Computes in fp32 whatever autocast says.'''
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return x.float() @ self.up.weight.T @ self.up.weight

class OfOneTypeProvider(SwiGLUProvider):
    def create_layer(self, d_model, d_ff, dropout=0.0):
        return OfOneType(d_model, d_ff, dropout)

class Stubborn(Types):
    @hookimpl
    def apt_register_providers(self):
        return [ProviderSpec("ffn", "stubborn", OfOneTypeProvider)]

class NeverFinite(Base):
    @hookimpl
    def apt_loss_terms(self, trainer, output):
        return {"term": output.logits.sum() * (math.nan if trainer.manager.step > 2 else 0.0)}
"""


@dataclass
class Runs:
    """What the processes of each run told, and where its folder is."""

    folder: Path
    profile: dict[str, Any]
    samples: dict[str, str] = field(default_factory=dict)

    def told(self, name: str) -> list[dict[str, Any]]:
        return [json.loads((self.folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]

    def rows(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def tensors(self, name: str, part: str = "model", step: int = STEPS) -> dict[str, torch.Tensor]:
        saved = SavedTensors(self.checkpoint(name, step) / part)
        targets = {
            name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in saved.shapes.items()
        }
        saved.read_into(targets, part)
        return targets

    def checkpoint(self, name: str, step: int) -> Path:
        return self.folder / name / "checkpoints" / f"step-{step:08d}"

    def job(
        self,
        name: str,
        *,
        plugin: str = "",
        options: Mapping[str, Any] | None = None,
        second: Mapping[str, Any] | None = None,
        **keys: Any,
    ) -> tuple[str, dict[str, Any]]:
        """A run of two processes; ``second`` are keys of the second one's model."""
        return name, {
            "profile": with_keys(self.profile, {"training__grad_accum_steps": 1, **keys}),
            "plugin": plugin,
            "options": {"output": str(self.folder / name), **(options or {})},
            "second": second or {},
        }

    def alone(
        self,
        name: str,
        manager: PluginManager | None = None,
        *,
        keys: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """Train in this process; returns the sample."""
        profile = with_keys(self.profile, keys or {})
        return Trainer(profile, manager, output=self.folder / name, **options).fit().sample


def with_keys(profile: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    changed = {section: dict(v) if isinstance(v, dict) else v for section, v in profile.items()}
    for key, value in keys.items():
        section, _, name = key.partition("__")
        changed[section][name] = value
    return changed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> Runs:
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "text.txt").write_text(TEXT[:LENGTH], encoding="utf-8")
    profile = with_keys(
        {**TINY_PROFILE, "data": {"train_path": str(folder / "text.txt")}},
        {
            "training__grad_accum_steps": 2,
            "training__log_every_steps": 1,
            "training__max_steps": STEPS,
            "training__gradient_clip": 1.0,
            "training__ema_decay": 0.9,
            "training__keep_last": 0,
            "hardware__num_threads": 1,
        },
    )
    runs = Runs(folder, profile)
    plugins: dict[str, Any] = {"__name__": "plugins"}
    exec(PLUGINS, plugins)
    for optimizer in ("adamw", "muon"):
        by = {"training__optimizer_name": optimizer}
        runs.samples[optimizer] = runs.alone(f"alone_{optimizer}", keys=by)
        manager = PluginManager()
        manager.register(plugins["Uneven"]({"rank": 0}), "uneven")
        whole = {"training__batch_size": 1, "training__grad_accum_steps": 8}
        runs.alone(f"alone_uneven_{optimizer}", manager, keys={**UNEVEN, **whole, **by})
        manager = PluginManager()
        manager.register(plugins["Staged"]({"rank": 0}), "staged")
        runs.alone(f"alone_staged_{optimizer}", manager, keys=by)
    runs.alone("alone_half", stop_at_step=HALF)
    half = {"stop_at_step": HALF}
    sharded = {"hardware__distributed": "fsdp"}
    muon = {"training__optimizer_name": "muon"}
    from_half = {"resume_from": str(runs.checkpoint("alone_half", HALF))}
    from_sharded = {"resume_from": str(runs.checkpoint("fsdp_half", HALF))}
    four = {"training__grad_accum_steps": 4, "training__batch_size": 1}
    three = {"training__max_steps": 3, **four}
    jobs = dict(
        [
            runs.job("ddp_adamw"),
            runs.job("ddp_muon", **muon),
            runs.job("fsdp_adamw", **sharded),
            runs.job("fsdp_muon", **sharded, **muon),
            runs.job("ddp_half", options=half, plugin="State"),
            runs.job("fsdp_half", options=half, plugin="State", **sharded),
            runs.job("ddp_on", options=from_half),
            runs.job("fsdp_on", options=from_half, **sharded),
            runs.job("fsdp_again", options=from_sharded, plugin="State", **sharded),
            runs.job("ddp_refused", options=from_half, training__grad_accum_steps=2),
            runs.job("ddp_counts", plugin="Counts", **three),
            runs.job("fsdp_counts", plugin="Counts", **sharded, **three),
            *(
                runs.job(name, plugin=name, training__save_freq=0)
                for name in ("StopsAlone", "StopsAloneAround", "RequestsAlone", "NotFinite")
            ),
            runs.job("NotFiniteSharded", plugin="NotFinite", **sharded),
            runs.job("FailsAlone", plugin="FailsAlone"),
            runs.job("FreezesAlone", plugin="FreezesAlone"),
            runs.job("FreezesAloneSharded", plugin="FreezesAlone", **sharded),
            *(
                runs.job(f"{name}_uneven_{optimizer}", plugin="Uneven", **UNEVEN, **four, **keys)
                for name, how in (("ddp", {}), ("fsdp", sharded))
                for optimizer, keys in (("adamw", how), ("muon", {**how, **muon}))
            ),
            *(
                runs.job(
                    f"{name}_staged_{optimizer}{part}",
                    plugin="Staged",
                    options=options(f"{name}_staged_{optimizer}_half"),
                    training__grad_accum_steps=2,
                    training__batch_size=2,
                    **keys,
                )
                for name, optimizer, keys in (
                    ("ddp", "adamw", {}),
                    ("fsdp", "adamw", sharded),
                    ("fsdp", "muon", {**sharded, **muon}),
                )
                for part, options in (
                    ("", lambda _: {}),
                    ("_half", lambda _: half),
                    ("_on", lambda at: {"resume_from": str(runs.checkpoint(at, HALF))}),
                )
                if not part or optimizer == "adamw"
            ),
            runs.job(
                "NeverFinite", plugin="NeverFinite", training__max_nonfinite_steps=2, **sharded
            ),
            runs.job("differs", second={"tie_embeddings": False}),
            *(
                runs.job(f"{name}_narrow", plugin="Types", training__mixed_precision=True, **how)
                for name, how in (("ddp", {}), ("fsdp", sharded))
            ),
            *(
                runs.job(
                    f"{name}_uneven_narrow",
                    plugin="Uneven",
                    training__mixed_precision=True,
                    **UNEVEN,
                    **four,
                    **how,
                )
                for name, how in (("ddp", {}), ("fsdp", sharded))
            ),
            runs.job(
                "stubborn",
                plugin="Stubborn",
                training__mixed_precision=True,
                training__max_steps=2,
                model__ffn_name="stubborn",
                **sharded,
            ),
            runs.job("compiled", training__compile=True, training__max_steps=3),
            runs.job(
                "compiled_narrow",
                training__compile=True,
                training__max_steps=3,
                training__mixed_precision=True,
                **sharded,
            ),
        ]
    )
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "worker.py").write_text(WORKER)
    (folder / "plugins.py").write_text(PLUGINS)
    paths = os.pathsep.join([str(ROOT), str(folder)])
    with forks():
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             str(folder / "worker.py"), str(folder)],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return runs


def figures(rows: list[dict[str, Any]], *, after: int = -1) -> list[float]:
    """The losses and gradient norms of ``rows`` after a step, of training and of evaluation."""
    names = ("loss", "grad_norm", "val_loss")
    return [row[name] for row in rows for name in names if name in row and row["step"] > after]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(runs: Runs, sharding: str, optimizer: str) -> None:
    name = f"{sharding}_{optimizer}"
    alone, together = runs.rows(f"alone_{optimizer}"), runs.rows(name)
    assert [row["tokens"] for row in alone] == [row["tokens"] for row in together]
    assert figures(together) == pytest.approx(figures(alone), rel=3e-6)  # fp32 rounds at 1.2e-7
    for part in PARTS:
        expected = runs.tensors(f"alone_{optimizer}", part)
        torch.testing.assert_close(runs.tensors(name, part), expected, rtol=1e-4, atol=1e-5)
    first, second = runs.told(name)
    assert first["sample"] == second["sample"] == runs.samples[optimizer]
    assert first["figures"]["val_loss"] == second["figures"]["val_loss"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_parameters_without_a_gradient_in_a_process_or_in_all_learn_as_in_one(
    runs: Runs, sharding: str, optimizer: str
) -> None:
    """Frozen for a while, used by a term of some micro-batches, of no micro-batch, or of padding:
    the second process has nothing else in the last micro-batch of an epoch."""
    name, alone = f"{sharding}_uneven_{optimizer}", f"alone_uneven_{optimizer}"
    first, second = (set(told["rare"]) for told in runs.told(name))
    assert first - second and second - first and len(first | second) < STEPS
    assert figures(runs.rows(name)) == pytest.approx(figures(runs.rows(alone)), rel=1e-6)
    for part in PARTS:
        expected = runs.tensors(alone, part)
        torch.testing.assert_close(runs.tensors(name, part), expected, rtol=1e-4, atol=1e-5)
        assert any("ffn.never" in tensor for tensor in expected) == (part != "optimizer")


@pytest.mark.parametrize(
    ("sharding", "optimizer"), [("ddp", "adamw"), ("fsdp", "adamw"), ("fsdp", "muon")]
)
def test_stages_of_the_trainable_set_are_those_of_one_process_and_are_resumed_to_the_bit(
    runs: Runs, sharding: str, optimizer: str
) -> None:
    name, alone = f"{sharding}_staged_{optimizer}", f"alone_staged_{optimizer}"
    assert figures(runs.rows(name)) == pytest.approx(figures(runs.rows(alone)), rel=3e-6)
    for part in PARTS:
        found = runs.tensors(name, part)
        torch.testing.assert_close(found, runs.tensors(alone, part), rtol=1e-4, atol=1e-5)
        if optimizer == "adamw":
            torch.testing.assert_close(runs.tensors(f"{name}_on", part), found, rtol=0, atol=0)
    if optimizer == "muon":
        return
    held = runs.tensors(f"{name}_half", "optimizer", HALF)
    frozen = runs.tensors(name).keys() - {key.partition("//")[0] for key in held}
    assert frozen == {"embedding.weight"}


@pytest.mark.parametrize("name", ["narrow", "uneven_narrow"])
def test_layers_that_are_gathered_in_bf16_learn_as_under_autocast(runs: Runs, name: str) -> None:
    """The casts that autocast would make of them; the norms and what a layer has beside its
    matrices are rounded too. What is kept and saved is in fp32."""
    found, expected = (figures(runs.rows(f"{sharding}_{name}")) for sharding in ("fsdp", "ddp"))
    assert found == pytest.approx(expected, rel=2e-2)
    saved = [runs.tensors(f"{how}_{name}", part) for how in ("fsdp", "ddp") for part in PARTS]
    assert {tensor.dtype for tensors in saved for tensor in tensors.values()} == {torch.float32}


def test_where_a_layer_takes_bf16_it_is_gathered_in_it(runs: Runs) -> None:
    wide, narrow = "torch.float32", "torch.bfloat16"
    for told, types in (
        (runs.told("ddp_narrow"), [wide, wide, wide]),
        (runs.told("fsdp_narrow"), [narrow, narrow, wide]),
        (runs.told("stubborn"), [wide, wide, wide]),
    ):
        for each in told:
            assert (each["status"], each["types"], each["kept"]) == ("finished", types, [wide])
    assert runs.told("fsdp_narrow")[0]["loss"] == runs.told("fsdp_narrow")[1]["loss"] > 0
    log = (runs.folder / "stubborn" / "log.txt").read_text()
    assert log.count("FSDP2 gathers the layers in fp32") == 1
    assert "with parameters in bfloat16 they fail (RuntimeError: " in log
    assert "FSDP2 gathers" not in (runs.folder / "fsdp_narrow" / "log.txt").read_text()


@pytest.mark.parametrize("name", ["FreezesAlone", "FreezesAloneSharded"])
def test_a_parameter_that_one_process_froze_is_named_before_anything_is_wrong(
    runs: Runs, name: str
) -> None:
    for told in runs.told(name):
        assert told["error"].startswith(
            "TrainingError: parameter blocks.0.ffn_norm.weight is frozen in process 1 and learns in"
        )
    assert [path.name for path in (runs.folder / name / "checkpoints").iterdir()] == [
        "step-00000002"
    ]


def test_the_ragged_step_of_an_epoch_leaves_a_process_without_targets(runs: Runs) -> None:
    tokens = torch.arange(
        next(r for r in runs.rows("alone_adamw") if r["step"] == 6)["tokens"] + 1
    ).numpy()
    windows = ConcatWindows(ArrayPart(tokens), 16)
    steps = StepPlan(len(windows), seq_len=16, windows_per_step=8)
    order = Order([""], [len(windows)], steps, seed=0)
    plan = BatchPlan(order, [windows], batch_size=4, rank=1, world_size=2)
    assert plan.steps_per_epoch == 6
    assert sum(batch.num_targets for batch in plan.step(1, 5).batches) == 0


def test_gradients_are_brought_together_once_a_step(runs: Runs) -> None:
    """Of four micro-batches the last one's backward does it; the loss goes along once more."""
    for told in runs.told("ddp_counts"):
        assert told["collectives"].count("c10d::allreduce_") == 2
    for told in runs.told("fsdp_counts"):
        # A layer, and the rest of the model.
        assert told["collectives"].count("c10d::_reduce_scatter_base_") == 2
        # The loss, and the norm of the gradients.
        assert told["collectives"].count("c10d::allreduce_") == 2


def test_loggers_are_told_once_and_the_others_in_every_process(runs: Runs) -> None:
    first, second = runs.told("ddp_counts")
    assert first["on_step_end"] == second["on_step_end"] == 3
    assert first["on_evaluation_end"] == second["on_evaluation_end"] == 2
    assert first["on_metrics"] == 3 + 2
    assert first["on_checkpoint_saved"] == 1
    assert "on_metrics" not in second
    assert "on_checkpoint_saved" not in second
    assert len(runs.rows("ddp_counts")) == 3 + 2


@pytest.mark.parametrize("name", ["ddp_on", "fsdp_on", "fsdp_again"])
def test_a_checkpoint_of_any_number_of_processes_goes_on_in_two(runs: Runs, name: str) -> None:
    rest = figures(runs.rows("alone_adamw"), after=HALF)
    assert figures(runs.rows(name), after=HALF) == pytest.approx(rest, rel=1e-6)


@pytest.mark.parametrize("name", ["ddp_half", "fsdp_half"])
def test_a_checkpoint_of_two_processes_goes_on_in_one(runs: Runs, name: str) -> None:
    for part in PARTS:
        saved, expected = runs.tensors(name, part, HALF), runs.tensors("alone_half", part, HALF)
        torch.testing.assert_close(saved, expected, rtol=1e-4, atol=1e-6)
    runs.alone(f"{name}_alone", resume_from=runs.checkpoint(name, HALF))
    rest = figures(runs.rows("alone_adamw"), after=HALF)
    assert figures(runs.rows(f"{name}_alone"), after=HALF) == pytest.approx(rest, rel=1e-6)


def test_another_global_batch_is_refused_with_the_number_that_fits(runs: Runs) -> None:
    for told in runs.told("ddp_refused"):
        assert "a step takes 16 sequences (4 a micro-batch, 2 processes)" in told["error"]
        assert "--training.grad_accum_steps 1 makes it 8" in told["error"]
    profile = with_keys(runs.profile, {"training__grad_accum_steps": 1})
    with pytest.raises(ConfigError, match=r"--training\.grad_accum_steps 2 makes it 8"):
        Trainer(profile, resume_from=runs.checkpoint("fsdp_half", HALF)).fit()


def test_the_state_of_the_first_process_s_plugin_is_kept_and_given_to_all(runs: Runs) -> None:
    for told in runs.told("fsdp_again"):
        assert told["restored"] == [0, [0.0, 0.0]]


def test_a_sharded_checkpoint_is_safetensors_and_json_alone(runs: Runs) -> None:
    folder = runs.checkpoint("fsdp_half", HALF)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".yaml"}
    assert len(list((folder / "model").glob("*.safetensors"))) == 2
    for path in files:
        head = path.read_bytes()[:8]
        if path.suffix == ".safetensors":
            size = int.from_bytes(head, "little")
            json.loads(path.read_bytes()[8 : 8 + size])
        # What pickles of protocol 2 and up, and zip files of them, begin with.
        assert head[:2] not in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b"\xff" * 64),
        lambda path: path.write_bytes(pickle.dumps({"weights": [1.0]})),
        lambda path: path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}"),
        lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"),
        lambda path: path.write_bytes(with_header(path, dtype="F99")),
        lambda path: path.write_bytes(with_header(path, data_offsets=[0, 1 << 40])),
        lambda path: path.write_bytes(with_header(path, shape=[-1])),
        lambda path: path.write_bytes(with_places(path, "x")),
        lambda path: path.write_bytes(with_places(path, {"saved_offsets": "x"})),
        lambda path: path.write_bytes(with_places(path, {"saved_offsets": None})),
        lambda path: path.write_bytes(with_places(path, {"saved_offsets": [1 << 40, 1 << 40]})),
        lambda path: path.unlink(),
    ],
    ids=[
        "cut",
        "noise",
        "pickle",
        "huge",
        "list",
        "dtype",
        "offsets",
        "shape",
        "place",
        "text",
        "none",
        "far",
        "gone",
    ],
)
def test_a_shard_that_is_not_one_is_refused(
    runs: Runs, tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(runs.checkpoint("fsdp_half", HALF) / "model", folder)
    harm(sorted(folder.glob("*.safetensors"))[-1])
    with pytest.raises(CheckpointError, match="model"):
        targets = runs.tensors("alone_half", step=HALF)
        SavedTensors(folder).read_into(targets, "model")


def with_header(path: Path, **values: Any) -> bytes:
    """A safetensors file with each tensor's entry changed."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for name, entry in header.items():
        if name != "__metadata__":
            entry.update(values)
    return written(header, data[8 + size :])


def with_places(path: Path, place: Any) -> bytes:
    """A shard that says of each tensor that it lies at ``place`` of the whole one."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    places = {name: place for name in header if name != "__metadata__"}
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(places)
    return written(header, data[8 + size :])


def written(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize("name", ["StopsAlone", "StopsAloneAround", "RequestsAlone"])
def test_what_one_process_asks_for_ends_the_run_in_all(runs: Runs, name: str) -> None:
    first, second = runs.told(name)
    for told in (first, second):
        assert (told["status"], told["reason"]) == ("stopped", "the second has enough")
        assert told["step"] in (3, 4)
    assert first["step"] == second["step"]
    assert runs.checkpoint(name, first["step"]).is_dir()


@pytest.mark.parametrize("name", ["NotFinite", "NotFiniteSharded"])
def test_nan_in_one_process_moves_no_parameter_in_any(runs: Runs, name: str) -> None:
    for told in runs.told(name):
        assert told["still"][:4] == [False, True, True, False]
        assert told["skipped"] == 2
    assert [row.get("skipped_steps", 0) for row in runs.rows(name) if "loss" in row][:4] == [
        0, 1, 2, 2,
    ]  # fmt: skip


def test_a_failure_that_all_processes_share_leaves_a_sharded_checkpoint(runs: Runs) -> None:
    for told in runs.told("NeverFinite"):
        assert told["error"].startswith("TrainingError: 2 steps in a row")
    assert runs.tensors("NeverFinite", step=4).keys() == runs.tensors("fsdp_adamw").keys()


def test_a_plugin_that_one_process_quarantines_is_quarantined_in_all(runs: Runs) -> None:
    first, second = runs.told("FailsAlone")
    for told in (first, second):
        state, reason = told["states"]["failsalone"]
        assert state == "quarantined"
        assert "broken in the second" in reason
    assert first["states"]["failsalone"][1].endswith(", in process 1")
    assert first["calls"] == 3
    assert "calls" not in second
    log = (runs.folder / "FailsAlone" / "log.txt").read_text()
    assert log.count("process 1: plugin failsalone failed in on_step_end at step") == 3


def test_a_loss_term_that_fails_among_several_processes_is_fatal() -> None:
    class Term:
        @hookimpl
        def apt_loss_terms(self) -> None:
            raise RuntimeError("broken")

    manager = PluginManager()
    manager.register(Term(), "term")
    arguments: dict[str, Any] = {"trainer": None, "batch": None, "output": None}
    manager.stop_together = lambda reason: None
    with pytest.raises(PluginError, match="must train on the same loss"):
        manager.call_each("apt_loss_terms", **arguments)


def test_a_collective_hook_that_fails_is_fatal_among_several_processes_alone() -> None:
    class Sums:
        @hookimpl(collective=True)
        def on_step_end(self) -> None:
            raise RuntimeError("broken")

    manager = PluginManager()
    manager.register(Sums(), "sums")
    manager.hook.on_step_end(step=1, loss=None, trainer=None)
    assert [failure.hook for failure in manager.records["sums"].failures] == ["on_step_end"]
    manager.stop_together = lambda reason: None
    with pytest.raises(PluginError, match=r"broken.*; the run stops because every process"):
        manager.hook.on_step_end(step=2, loss=None, trainer=None)


def test_processes_that_do_not_train_the_same_are_refused(runs: Runs) -> None:
    for told in runs.told("differs"):
        assert told["error"] == (
            "ConfigError: model.tie_embeddings: False in process 1, True in process 0 "
            "(all the processes of a run need the same)"
        )


def test_a_compiled_model_trains_in_two_processes(runs: Runs) -> None:
    expected = figures(runs.rows("ddp_adamw"))[:3]
    assert figures(runs.rows("compiled"))[:3] == pytest.approx(expected, rel=1e-5)
    narrow = figures(runs.rows("compiled_narrow"))[:3]
    assert narrow == pytest.approx(figures(runs.rows("fsdp_narrow"))[:3], rel=2e-2)
