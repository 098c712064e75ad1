"""The plan of a run, without training: providers, costs, memory and the timeline of stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from apt_core.config import Config, Source, check_files
from apt_core.config.switches import UNITS
from apt_core.data.batches import StepPlan, num_windows
from apt_core.data.loading import build_tokenizer, load_text
from apt_core.data.tokens import tokenize
from apt_core.device import autocast_dtype
from apt_core.error_text import one_line
from apt_core.errors import AptError
from apt_core.kernel import Kernel, before_the_run
from apt_core.modeling.blame import naming_authors
from apt_core.modeling.compilation import compilation, computes
from apt_core.modeling.costs import (
    BACKWARD_AND_FORWARD,
    ModelCost,
    model_cost,
    support_notices,
)
from apt_core.modeling.placement import settle_device
from apt_core.parallel.launch import processes_for
from apt_core.parallel.world import sharding_of
from apt_core.planning.calibration import Calibration, Speed
from apt_core.planning.footprint import Footprint
from apt_core.planning.memory import MemoryEstimate, estimate, switch_memory
from apt_core.planning.plan_text import print_plan
from apt_core.planning.run_length import tell_what_the_length_decides
from apt_core.planning.stages import Stage, stages
from apt_core.plugin_names import is_file_reference
from apt_core.provider_keys import DATA_PATHS, data_files
from apt_core.providers.tokenizer import TokenizerProvider
from apt_core.runs.manifest import plugin_rows
from apt_core.schedules import Horizon, Schedule
from apt_core.types import PluginCosts

__all__ = ["make_plan", "print_plan", "processes"]

READ_UP_TO = 64 * 2**20
"""Bytes of a text that a plan reads, to tell the steps of an epoch."""


def make_plan(kernel: Kernel, world_size: int | None = None) -> dict[str, Any]:
    """The plan as JSON values, with the keys profile, device, computes, providers, plugins,
    inactive_keys, notices, missing, model, batch, calibration and stages.

    ``computes`` has the ``precision`` of the forward, whether a GPU multiplies fp32 in ``tf32``,
    and what ``compile`` comes to: its ``mode``, null where nothing is compiled, and the ``reason``.
    ``missing`` has what the run needs and this machine lacks: ``key`` of the profile and
    ``message``. ``model`` has the parts of the model at the start with their costs, as
    :mod:`apt_core.modeling.costs` counts them; what a provider cannot tell is null there, with a
    notice. ``batch`` says what a step takes and how many make an epoch, null where the text is not
    at hand or is large.

    A stage begins where a plugin becomes enabled or disabled. It has the parameters (those that a
    token passes through are ``params_active``) and the FLOPs per token of training, in
    ``plugin_flops_per_token`` those of what plugins compute beside it; ``memory`` of one process in
    bytes, as :mod:`apt_core.planning.memory` counts it, for ``world_size`` processes (by default
    those that ``hardware`` asks for) on the device that the profile names; ``switch_memory``, what
    it takes to change the structure of the model there, null where nothing changes it; and the
    seconds that an epoch, or a million tokens, are expected to take on ``calibration.device``,
    which :mod:`apt_core.planning.calibration` has timed, null where that is not known.

    No value of the whole model is computed, so that a large profile is planned in seconds;
    providers are probed as at the start of a run. Raises ConfigError as a run would.
    """
    missing = missing_parts(kernel, world_size)
    if world_size is None:
        world_size = processes(kernel.config)
    known = len(kernel.notices)
    with before_the_run():
        device = settle_device(kernel)
    missing += [_entry(text) for text in kernel.notices[known:]]
    del kernel.notices[known:]
    with before_the_run(), naming_authors(kernel):
        for kind, name in kernel.providers:
            kernel.registry.get(kind, name)
        tokenizer = build_tokenizer(kernel)
        cost = model_cost(kernel)
        batch, steps = _batch(kernel, tokenizer, world_size)
        schedule = kernel.schedule.with_horizon(_planned_horizon(kernel.config, steps))
        lr_schedule = kernel.registry.get("lr_schedule", kernel.config.training.lr_schedule_name)
        tell_what_the_length_decides(kernel, schedule, lr_schedule)
        planning = _Planning(kernel, cost, batch, schedule, Calibration(kernel, device, cost))
        rows = planning.rows()
    return {
        "profile": kernel.config.name,
        "device": str(device),
        "computes": _computes(kernel, device, world_size),
        "providers": [row.row() for row in kernel.registry.resolutions.values()],
        "plugins": [_at_the_start(kernel, row) for row in plugin_rows(kernel)],
        "inactive_keys": [{"key": k.key, "reason": k.reason} for k in kernel.inactive],
        "paths": _paths(kernel.config),
        "notices": [
            *kernel.notices,
            *support_notices(kernel, device),
            *cost.notes,
            *planning.notes,
        ],
        "missing": missing,
        "model": cost.row(),
        "batch": batch,
        "calibration": planning.calibration.row(),
        "stages": rows,
    }


def missing_parts(kernel: Kernel, world_size: int | None) -> list[dict[str, str]]:
    """What the profile names and this machine lacks, but for the device: data files, and GPUs for
    all the processes where nobody else said how many there are to be."""
    config = kernel.config
    source = Source.from_dict(config.to_dict())
    files = check_files(config, source, data_files(config, kernel.registry.known))
    found = [{"key": p.key, "message": p.message} for p in files]
    if world_size is None and processes(config) > 1:
        _, notice = processes_for(config)
        found += [_entry(notice)] if notice else []
    return found


def _computes(kernel: Kernel, device: torch.device, world_size: int) -> dict[str, Any]:
    config = kernel.config
    dtype = autocast_dtype(config.training.mixed_precision, device, config.model.d_model)
    chosen = compilation(kernel, device, sharding_of(config, world_size), world_size)
    return computes(config, device, dtype, chosen)


def _paths(config: Config) -> list[dict[str, str]]:
    """The paths of the profile as they were found, by key."""
    named = {
        **{f"data.{key}": getattr(config.data, key) for key in DATA_PATHS},
        "training.checkpoint_dir": config.training.checkpoint_dir,
    }
    found = [{"key": key, "path": path} for key, path in named.items() if path is not None]
    files = [plugin.name for plugin in config.plugins if is_file_reference(plugin.name)]
    return [*({"key": "plugins", "path": path} for path in files), *found]


def _entry(notice: str) -> dict[str, str]:
    key, _, message = notice.partition(": ")
    return {"key": key, "message": message}


def _at_the_start(kernel: Kernel, row: dict[str, Any]) -> dict[str, Any]:
    """A plugin's row with the state in which the run begins."""
    enabled = kernel.schedule.should_enable_plugin(row["name"], epoch=1, step=1, tokens=0)
    if row["state"] == "active" and not enabled:
        return {**row, "state": "dormant", "reason": "waits for its schedule"}
    return row


def processes(config: Config) -> int:
    """How many processes the profile asks for."""
    return max(1, config.hardware.num_gpus) if config.hardware.distributed else 1


def _batch(
    kernel: Kernel, tokenizer: TokenizerProvider, world_size: int
) -> tuple[dict[str, Any], StepPlan | None]:
    """What one optimizer step takes, and how many make an epoch; those steps, where the text is at
    hand."""
    config, training = kernel.config, kernel.config.training
    length = config.seq_len
    sequences = training.batch_size * training.grad_accum_steps * world_size
    batch: dict[str, Any] = {
        "processes": world_size,
        "sequences_per_step": sequences,
        "tokens_per_step": sequences * length,
        "steps_per_epoch": None,
        "tokens_per_epoch": None,
        "evaluated_tokens_per_epoch": None,
    }
    counts = _token_counts(kernel, tokenizer)
    if counts is None or num_windows(counts[0], length) < 1:
        return batch, None
    steps = StepPlan(counts[0], seq_len=length, windows_per_step=sequences, seed=training.seed)
    evaluated = _evaluated(config, steps.steps_per_epoch, num_windows(counts[1], length))
    batch["steps_per_epoch"] = steps.steps_per_epoch
    batch["tokens_per_epoch"] = steps.num_windows * length
    batch["evaluated_tokens_per_epoch"] = evaluated * length
    return batch, steps


def _planned_horizon(config: Config, steps: StepPlan | None) -> Horizon:
    """How long the run is, as far as that can be told without its data."""
    if steps is not None:
        return Horizon.of(config, steps)
    return Horizon(config.training.max_epochs, config.training.max_steps)


def _evaluated(config: Config, steps: int, windows: int) -> int:
    """The sequences that are evaluated in an epoch: a few batches now and then, and all held-out
    text at its end."""
    evaluation = config.evaluation
    few = min(windows, evaluation.eval_batches * config.training.batch_size)
    # What would be due at the end of the epoch is done with the rest.
    times = (steps - 1) // evaluation.eval_freq if evaluation.eval_freq else 0
    return times * few + windows


def _token_counts(kernel: Kernel, tokenizer: TokenizerProvider) -> tuple[int, int] | None:
    """The tokens of the training text and the held-out one; None where it would take long to tell,
    or fails."""
    data = kernel.config.data
    paths = [Path(path) for path in (data.train_path, data.val_path) if path]
    if not all(path.is_file() and path.stat().st_size <= READ_UP_TO for path in paths):
        return None
    try:
        text = load_text(kernel)
    except (AptError, OSError, ValueError) as error:
        kernel.notices.append(f"data: {one_line(error)}")
        return None
    return len(tokenize(tokenizer, text.train)), len(tokenize(tokenizer, text.val))


class _Planning:
    """The stages of the run as rows; ``notes`` say what could not be told, and why."""

    def __init__(
        self,
        kernel: Kernel,
        cost: ModelCost,
        batch: dict[str, Any],
        schedule: Schedule,
        calibration: Calibration,
    ) -> None:
        self.kernel, self.cost, self.batch = kernel, cost, batch
        self.schedule, self.calibration = schedule, calibration
        self._footprints: dict[tuple[int, PluginCosts], Footprint] = {}
        self._speeds: dict[int, Speed | None] = {}

    @property
    def notes(self) -> list[str]:
        """Each of them once."""
        footprints = self._footprints.values()
        said = [note for footprint in footprints for note in footprint.notes]
        return [*dict.fromkeys([*said, *self.calibration.notes])]

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        before: tuple[Footprint, MemoryEstimate] | None = None
        # All of them first: what a plugin cannot do is said before anything takes time.
        for stage in [*stages(self.kernel, self.schedule)]:
            footprint = self._footprint(stage)
            size = self.batch["processes"]
            memory = estimate(footprint, size, sharding_of(self.kernel.config, size))
            switching = None
            if stage.switches and before:
                switching = switch_memory(before[0], footprint, before[1], memory)
            rows.append(self._row(stage, memory, switching))
            before = footprint, memory
        return rows

    def _footprint(self, stage: Stage) -> Footprint:
        key = id(stage.structure), stage.costs
        if key not in self._footprints:
            model = stage.structure.model
            self._footprints[key] = Footprint(self.kernel, structure=model, costs=stage.costs)
        return self._footprints[key]

    def _row(self, stage: Stage, memory: MemoryEstimate, switching: int | None) -> dict[str, Any]:
        structure, cost = stage.structure, self.cost
        flops = structure.flops_per_token(cost)
        extra = None if flops is None else _plugin_flops(flops, stage.costs)
        return {
            "name": stage.name,
            **{unit: stage.at if unit == stage.unit else None for unit in UNITS},
            "params_total": structure.params,
            "params_active": structure.active_params,
            "memory": memory.row(),
            "memory_mb": round(memory.total / 2**20, 1),
            "switch_memory": switching,
            "flops_per_token": flops,
            "plugin_flops_per_token": extra,
            "kv_cache_bytes_per_token": cost.kv_cache_bytes_per_token,
            "kv_cache_bytes_per_sequence": cost.kv_cache_bytes_per_sequence,
            **self._time(stage, memory, flops, extra),
        }

    def _time(
        self, stage: Stage, memory: MemoryEstimate, flops: int | None, extra: int | None
    ) -> dict[str, Any]:
        """How long the run takes in this stage, evaluations included where an epoch is known."""
        structure, batch = stage.structure, self.batch
        if id(structure) not in self._speeds:
            self._speeds[id(structure)] = self.calibration.speed(structure)
        speed = self._speeds[id(structure)]
        row = dict.fromkeys(("seconds_per_epoch", "seconds_per_million_tokens"))
        if speed is None or flops is None or extra is None:
            return {**row, "flops_per_s": None, "measured": None}
        size = batch["processes"]
        shards = size if memory.sharding == "fsdp" else 1
        slowdown = self.calibration.slowdown(size)
        work = batch["tokens_per_step"] / size * (flops + extra)
        step = speed.step_seconds(work, structure.params // shards) * slowdown
        epoch = None
        if batch["steps_per_epoch"] is not None:
            steps = batch["tokens_per_epoch"] / batch["tokens_per_step"]
            evaluated = batch["evaluated_tokens_per_epoch"] / size * flops / BACKWARD_AND_FORWARD
            epoch = steps * step + speed.step_seconds(evaluated, 0) * slowdown
        return {
            "seconds_per_epoch": epoch and _rounded(epoch),
            "seconds_per_million_tokens": _rounded(step / batch["tokens_per_step"] * 1e6),
            "flops_per_s": _rounded(speed.flops_per_s),
            "measured": speed.measured,
        }


def _plugin_flops(flops: int, costs: PluginCosts) -> int:
    """What plugins compute beside the training, per token."""
    forward = flops // BACKWARD_AND_FORWARD
    return forward * (costs.forwards + BACKWARD_AND_FORWARD * costs.passes)


def _rounded(value: float) -> float:
    """An estimate's three figures."""
    return float(f"{value:.3g}")
