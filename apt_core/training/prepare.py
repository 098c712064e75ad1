"""Builds what a run needs before its first step: text, model, optimizer, learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from apt_core.data.batches import BatchPlan
from apt_core.data.loading import RunData, batch_plan, load_data
from apt_core.data.store.lock import StopCheck, never_stop
from apt_core.device import autocast_dtype, reset_peak_memory
from apt_core.kernel import Kernel, before_the_run
from apt_core.log import get_logger
from apt_core.modeling.blame import naming_authors
from apt_core.modeling.blocks import block_stack
from apt_core.modeling.compilation import compilation
from apt_core.modeling.compose import ModelBuilder
from apt_core.modeling.costs import support_notices
from apt_core.modeling.lr_scale import undeclared_squares
from apt_core.modeling.seeds import fp32_products
from apt_core.modeling.trainable import PlacedStage
from apt_core.optim.build import build_optimizer
from apt_core.parallel.peak import measured_peak_flops
from apt_core.parallel.world import ALONE, World, inactive_alone
from apt_core.planning.run_length import check_run_length
from apt_core.planning.stages import checked_trainable
from apt_core.profile_paths import READ, TASKS, paths_of
from apt_core.providers.lr_schedule import LRScheduleProvider
from apt_core.providers.optimizer import OptimizerProvider
from apt_core.providers.tokenizer import TokenizerProvider
from apt_core.runs.folder import versions
from apt_core.schedules import Horizon
from apt_core.training.curriculum.rehearsal import rehearse
from apt_core.training.gathering import gathered_dtype
from apt_core.training.step.forward import Forward
from apt_core.training.tasks import RunTask, load_tasks

log = get_logger("apt.training")


Weights = Callable[[nn.Module], None]
"""Fills the parameters of a new model."""


@dataclass(frozen=True)
class Built:
    """A model with its optimizer; ``forward`` computes the model, compiled or not."""

    model: nn.Module
    optimizer: Optimizer
    forward: Forward


@dataclass(frozen=True)
class Parts:
    """The parts of a run that never change: its data with the tokenizer, the division into batches,
    learning-rate schedule, device and precision, the tasks that its model is scored on, and the
    stages of its trainable set."""

    device: torch.device
    dtype: torch.dtype | None
    plan: BatchPlan
    data: RunData
    lr_schedule: LRScheduleProvider
    tasks: Sequence[RunTask] = ()
    trainable: Sequence[PlacedStage] = ()

    @property
    def tokenizer(self) -> TokenizerProvider:
        """The tokenizer of the data."""
        return self.data.tokenizer


def prepare(
    kernel: Kernel,
    device: torch.device,
    world: World = ALONE,
    check_stop: StopCheck = never_stop,
    weights: Weights | None = None,
    kept_tokenizer: Path | None = None,
) -> tuple[Parts, Built]:
    """Build the parts of a run and its model, whose parameters ``weights`` fills if it is given.
    What ``check_stop`` raises ends the build of its data. ``kept_tokenizer`` is where a run that
    continues has kept the files of its tokenizer.

    Raises ConfigError for inconsistent input; an error of a plugin's provider is raised as one that
    names the plugin.
    """
    with before_the_run(), naming_authors(kernel):
        return _prepare(kernel, device, world, check_stop, weights, kept_tokenizer)


def _prepare(
    kernel: Kernel,
    device: torch.device,
    world: World,
    check_stop: StopCheck,
    weights: Weights | None,
    kept_tokenizer: Path | None,
) -> tuple[Parts, Built]:
    config = kernel.config
    if world.size == 1:
        kernel.add_inactive(inactive_alone(config))
    dtype = autocast_dtype(config.training.mixed_precision, device, config.model.d_model)
    # Measured before the model takes memory.
    measured_peak_flops(device, dtype or torch.float32)
    reset_peak_memory(device)  # of the measurement and of earlier runs
    data = load_data(
        kernel,
        check_stop=check_stop,
        begin_early=config.data.begin_early,
        kept_tokenizer=kept_tokenizer,
    )
    log.info("data: %s", data.description)
    try:
        return _prepare_on(data, kernel, device, dtype, world, weights)
    except BaseException:
        data.close()
        raise


def _prepare_on(
    data: RunData,
    kernel: Kernel,
    device: torch.device,
    dtype: torch.dtype | None,
    world: World,
    weights: Weights | None,
) -> tuple[Parts, Built]:
    config, registry, training = kernel.config, kernel.registry, kernel.config.training
    tasks = load_tasks(kernel, data)
    plan = batch_plan(kernel, data, world.rank, world.size)
    schedule = kernel.schedule.with_horizon(Horizon.of(config, plan.steps))
    lr_schedule = registry.get("lr_schedule", training.lr_schedule_name)
    check_run_length(kernel, schedule, lr_schedule)
    with fp32_products(device, tf32=False):
        rehearse(kernel, schedule)
    trainable = checked_trainable(kernel, schedule)
    model = ModelBuilder(config, registry).build_model(initialize=weights is None)
    if weights is not None:
        weights(model)
    gathered = gathered_dtype(kernel, model, device, dtype, world)
    world.shard(model, block_stack(model)[1], device, gathered)
    model.to(device)
    kernel.notices += support_notices(kernel, device)
    optimizer = build_optimizer(kernel, model)
    _note_unknown_roles(kernel, model)
    world.require_alike(_shared_inputs(kernel, dtype, data, tasks))
    parts = Parts(
        device=device,
        dtype=dtype,
        plan=plan,
        data=data,
        lr_schedule=lr_schedule,
        tasks=tasks,
        trainable=trainable,
    )
    return parts, Built(model, optimizer, loop_forward(kernel, model, device, world))


def _note_unknown_roles(kernel: Kernel, model: nn.Module) -> None:
    """Add a notice about square matrices whose layer does not say whether they read the residual
    stream: their learning rate depends on it, and a square shape does not show it."""
    training, registry = kernel.config.training, kernel.registry
    provider: OptimizerProvider = registry.get("optimizer", training.optimizer_name)
    by_width = training.scale_lr_by_width and not getattr(provider, "separates_matrices", False)
    names = undeclared_squares(model, kernel.config.model.d_model) if by_width else []
    if names:
        more = f" and {len(names) - 1} more" if names[1:] else ""
        kernel.notices.append(
            f"{names[0]}{more}: no layer says whether it reads the residual stream or writes to it "
            "(reads_stream); it learns at the rate of one that writes"
        )


def loop_forward(kernel: Kernel, model: nn.Module, device: torch.device, world: World) -> Forward:
    """The forward of ``model`` for the loop, compiled or not; first copies the weights of the first
    process to all others."""
    world.replicate(model)
    chosen = compilation(kernel, device, world.sharding, world.size)
    return Forward(model, chosen, strict=kernel.manager.strict)


OWN_SECTIONS = ("name", "version", "description", "monitoring", "hardware", "debug")
"""Sections of the profile that may differ between the processes of a run."""


def _shared_inputs(
    kernel: Kernel, dtype: torch.dtype | None, data: RunData, tasks: Sequence[RunTask]
) -> dict[str, Any]:
    """All inputs of a run that must be equal in its processes."""
    registry, records = kernel.registry, kernel.manager.records
    profile = {k: part for k, part in kernel.config.to_dict().items() if k not in OWN_SECTIONS}
    # Machines may keep the data at different paths; its content is compared below.
    for key in (*READ, TASKS, ("training", "checkpoint_dir")):
        for holder, at in paths_of(profile, key):
            holder[at] = ""
    return {
        **profile,
        "text": {"sha256": data.sha256},
        "tokens": data.tokens_sha256,
        "tasks": {task.items.name: task.items.sha256 for task in tasks},
        "providers": {row.kind: row.used for row in registry.resolutions.values()},
        "plugins": {
            r.name: f"{r.version} {r.source_sha256}"
            for r in records.values()
            if r.state == "active"
        },
        "precision": str(dtype),
        "tf32": kernel.config.hardware.tf32,
        "versions": versions(),
    }
