"""Makes the plan of a run: providers, costs, memory and the timeline of stages."""

from __future__ import annotations

from typing import Any

import torch

from apt_core.config import Config, Source, check_files
from apt_core.config.switches import UNITS
from apt_core.data.loading import RunData, require_vocabulary, step_plan
from apt_core.data.order import StepPlan
from apt_core.device import autocast_dtype
from apt_core.kernel import Kernel, before_the_run
from apt_core.modeling.blame import naming_authors
from apt_core.modeling.compilation import compilation, computes
from apt_core.modeling.costs import (
    BACKWARD_AND_FORWARD,
    model_cost,
    support_notices,
)
from apt_core.modeling.placement import settle_device
from apt_core.parallel.launch import processes_for
from apt_core.parallel.world import sharding_of
from apt_core.planning.calibration import Calibration, Speed
from apt_core.planning.data import planned_data
from apt_core.planning.footprint import Footprint
from apt_core.planning.memory import MemoryEstimate, estimate, switch_memory
from apt_core.planning.plan_text import print_plan
from apt_core.planning.run_length import check_run_length
from apt_core.planning.stages import Stage, checked_trainable, stages
from apt_core.plugin_names import is_file_reference
from apt_core.provider_keys import DATA_PATHS, data_files
from apt_core.runs.manifest import plugin_rows
from apt_core.schedules import Horizon, Schedule
from apt_core.types import PluginCosts

__all__ = ["make_plan", "print_plan", "processes"]


def make_plan(kernel: Kernel, world_size: int | None = None) -> dict[str, Any]:
    """The plan as JSON values, with the keys profile, device, computes, providers, plugins,
    inactive_keys, notices, missing, model, batch, calibration and stages.

    ``computes`` has the ``precision`` of the forward, whether a GPU multiplies fp32 in ``tf32``,
    and the outcome of ``compile``: its ``mode``, null if nothing is compiled, and the ``reason``.
    ``missing`` lists what the run needs and this machine lacks, each with the ``key`` of the
    profile and a ``message``. ``model`` lists the parts of the model at the start with their costs,
    as :mod:`apt_core.modeling.costs` counts them; a cost that a provider cannot tell is null, with
    a notice. ``batch`` has the size of a step and the steps of an epoch, null if the text is
    missing or large.

    A stage begins where a plugin is enabled or disabled, or where other parameters are trained. It
    has the number of parameters, of those that one token uses (``params_active``) and of those that
    are not frozen (``params_trained``), and the FLOPs per token of training, if all were trained;
    ``plugin_flops_per_token`` are computed by plugins beside it. ``memory`` is that of one process
    in bytes, as :mod:`apt_core.planning.memory` counts it, for ``world_size`` processes (by default
    those that ``hardware`` asks for) on the profile's device. ``switch_memory`` is the peak while
    the structure of the model changes, null if it does not. The seconds of an epoch, or of a
    million tokens, are estimated for ``calibration.device`` by
    :mod:`apt_core.planning.calibration`, null if unknown.

    The whole model is never computed, so that a large profile is planned in seconds; providers are
    probed as at the start of a run. Raises ConfigError as a run would.
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
        tokenizer = kernel.registry.get("tokenizer", kernel.config.data.tokenizer_name)
        if not tokenizer.trainable:  # else its ids are known only with the data
            require_vocabulary(kernel, tokenizer)
        cost = model_cost(kernel)
        # What is missing is told already.
        files = {row["key"] for row in missing if row["key"].endswith(DATA_PATHS)}
        data, data_rows = (None, []) if files else planned_data(kernel)
        batch, steps = _batch(kernel, data, world_size)
        schedule = kernel.schedule.with_horizon(_planned_horizon(kernel.config, steps))
        lr_schedule = kernel.registry.get("lr_schedule", kernel.config.training.lr_schedule_name)
        check_run_length(kernel, schedule, lr_schedule)
        checked_trainable(kernel, schedule)
        planning = _Planning(kernel, batch, schedule, Calibration(kernel, device, cost))
        rows = planning.rows()
    return {
        "profile": kernel.config.name,
        "device": str(device),
        "computes": _computes(kernel, device, world_size),
        "providers": [row.row() for row in kernel.registry.resolutions.values()],
        "plugins": [_initial_state(kernel, row) for row in plugin_rows(kernel)],
        "inactive_keys": [{"key": k.key, "reason": k.reason} for k in kernel.inactive],
        "paths": _paths(kernel.config),
        "notices": [
            *kernel.notices,
            *support_notices(kernel, device),
            *cost.notes,
            *planning.notes,
        ],
        "missing": missing,
        "data": data_rows,
        "model": cost.row(),
        "batch": batch,
        "calibration": planning.calibration.row(),
        "stages": rows,
    }


def missing_parts(kernel: Kernel, world_size: int | None) -> list[dict[str, str]]:
    """Data files that are missing, and GPUs that are missing for the processes that the profile
    asks for, unless ``world_size`` says otherwise."""
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
    """The profile's paths as resolved, by key."""
    named: list[tuple[str, str | list[str] | None]] = [
        (f"{section}.{key}", getattr(settings, key))
        for section, settings in config.data.sections()
        for key in DATA_PATHS
    ]
    named.append(("training.checkpoint_dir", config.training.checkpoint_dir))
    found = [
        {"key": key, "path": path}
        for key, paths in named
        for path in ([paths] if isinstance(paths, str) else paths or ())
    ]
    files = [plugin.name for plugin in config.plugins if is_file_reference(plugin.name)]
    return [*({"key": "plugins", "path": path} for path in files), *found]


def _entry(notice: str) -> dict[str, str]:
    key, _, message = notice.partition(": ")
    return {"key": key, "message": message}


def _initial_state(kernel: Kernel, row: dict[str, Any]) -> dict[str, Any]:
    """A plugin's row with its state at the start of the run."""
    enabled = kernel.schedule.should_enable_plugin(row["name"], epoch=1, step=1, tokens=0)
    if row["state"] == "active" and not enabled:
        return {**row, "state": "dormant", "reason": "waits for its schedule"}
    return row


def processes(config: Config) -> int:
    """The number of processes that the profile asks for."""
    return max(1, config.hardware.num_gpus) if config.hardware.distributed else 1


def _batch(
    kernel: Kernel, data: RunData | None, world_size: int
) -> tuple[dict[str, Any], StepPlan | None]:
    """What one optimizer step takes, and how many make an epoch; those steps, where the ``data`` is
    at hand."""
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
    if data is None:
        return batch, None
    steps = step_plan(config, data.num_windows, sequences)
    evaluated = _evaluated(config, steps.steps_per_epoch, data.evaluation(1).num_windows)
    batch["steps_per_epoch"] = steps.steps_per_epoch
    batch["tokens_per_epoch"] = steps.num_windows * length
    batch["evaluated_tokens_per_epoch"] = evaluated * length
    return batch, steps


def _planned_horizon(config: Config, steps: StepPlan | None) -> Horizon:
    """The length of the run, as far as it is known without the data."""
    if steps is not None:
        return Horizon.of(config, steps)
    return Horizon(config.training.max_epochs, config.training.max_steps)


def _evaluated(config: Config, steps: int, windows: int) -> int:
    """The number of sequences evaluated in an epoch: some batches every ``eval_freq`` steps, and
    all held-out text at its end."""
    evaluation = config.evaluation
    few = min(windows, evaluation.eval_batches * config.training.batch_size)
    # At the end of the epoch the evaluation of everything replaces one of some batches.
    times = (steps - 1) // evaluation.eval_freq if evaluation.eval_freq else 0
    return times * few + windows


class _Planning:
    """Makes the rows of the run's stages; ``notes`` explain unknown figures."""

    def __init__(
        self,
        kernel: Kernel,
        batch: dict[str, Any],
        schedule: Schedule,
        calibration: Calibration,
    ) -> None:
        self.kernel, self.batch = kernel, batch
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
        # All stages are made first, so that errors of plugins come before slow measurements.
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
        structure, cost = stage.structure, self.calibration.cost_of(stage.structure)
        flops = structure.flops_per_token(cost)
        extra = None if flops is None else _plugin_flops(flops, stage.costs)
        return {
            "name": stage.name,
            **{unit: stage.at if unit == stage.unit else None for unit in UNITS},
            "params_total": structure.params,
            "params_active": structure.active_params,
            "params_trained": structure.trained_params,
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
        """The estimated time of the run in this stage, with evaluations if the epoch's steps are
        known."""
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
        step = speed.step_seconds(work, structure.trained_params // shards) * slowdown
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
    """FLOPs per token that plugins compute beside the training."""
    forward = flops // BACKWARD_AND_FORWARD
    return forward * (costs.forwards + BACKWARD_AND_FORWARD * costs.passes)


def _rounded(value: float) -> float:
    """``value`` rounded to the three figures of an estimate."""
    return float(f"{value:.3g}")
