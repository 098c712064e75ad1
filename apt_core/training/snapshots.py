"""Collects the contents of a checkpoint from the running parts of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from apt_core.error_text import one_line
from apt_core.hookspecs import hooks_where
from apt_core.log import get_logger
from apt_core.runs.checkpoint import Snapshot, inventory
from apt_core.runs.checkpoint_parts import (
    model_tensors,
    optimizer_groups,
    optimizer_tensors,
    split_states,
)
from apt_core.runs.folder import now, versions
from apt_core.runs.manifest import plugin_rows
from apt_core.runs.run_state import Average, RunState
from apt_core.runs.scores import Evaluated
from apt_core.training.context import RunContext
from apt_core.training.host_copies import HostCopies
from apt_core.training.step.usage import Usage

log = get_logger("apt.checkpoint")

REPLAYED = hooks_where(lambda policy: policy.replayed)


class Snapshots:
    """Takes snapshots of the run: copies that later steps do not change."""

    def __init__(self, run: RunContext, usage: Usage, watched: str) -> None:
        self._run, self._usage, self._watched = run, usage, watched
        world = run.world
        self._sharded = world.sharding == "fsdp"
        mesh = init_device_mesh("cpu", (world.size,)) if self._sharded else None
        # Replicas hold the same tensors, so the first process alone saves.
        self._copies = HostCopies(mesh, world.on_this_machine if self._sharded else 1)

    def take(
        self, evaluated: Evaluated | None, *, emergency: bool = False, in_step: bool = False
    ) -> Snapshot:
        """Copy the present state of the run, with the scores ``evaluated`` if it has any.

        In an ``emergency``, when the run fails, the state of plugins is left out if it cannot be
        read. ``in_step`` says that plugins may have seen a part of a step."""
        kernel = self._run.kernel
        try:
            states, plugin_tensors = split_states(
                kernel.manager.call_each("apt_state_dict", trainer=self._run.trainer)
            )
        except BaseException as error:  # the run is failing already: save without this
            if not emergency:
                raise
            log.error("the checkpoint is without the state of plugins: %s", one_line(error))
            states, plugin_tensors = {}, {}
        tensors: dict[str, dict[str, Tensor]] = {}
        if self._run.world.is_first or self._sharded:
            model, optimizer = self._run.trained.model, self._run.trained.optimizer
            kept: dict[str, Mapping[str, Tensor]] = {
                "model": model_tensors(model),
                "optimizer": optimizer_tensors(model, optimizer),
                **self._run.trained.averages.named,
            }
            # The previous checkpoint is written by now, so its host memory is reused.
            tensors = self._copies.of(kept)
        state = json.dumps(self._state(states, tensors).to_json(), indent=1, ensure_ascii=False)
        return Snapshot(
            step=self._run.progress.step,
            tensors=tensors,
            plugins=plugin_tensors,
            state=state + "\n",
            profile=kernel.config.to_yaml(),
            manifest={
                **({"in_step": self._kept_in_step()} if in_step else {}),
                "written": now(),
                "versions": versions(),
                "data": self._run.parts.data.row(),
                "providers": [row.row() for row in kernel.registry.resolutions.values()],
                "plugins": plugin_rows(kernel),
                "sound": self._run.trained.guard.in_a_row == 0,
            },
            evaluated=evaluated,
        )

    def _state(self, plugins: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> RunState:
        parts, trained = self._run.parts, self._run.trained
        averages = trained.averages
        return RunState.of(
            self._run.progress,
            windows_per_step=parts.plan.windows_per_step,
            nonfinite_steps=trained.guard.state(),
            modes=trained.modes.state(trained.model),
            spent=self._usage.spent,
            stopping=self._run.stopping.state(self._watched),
            precision=str(parts.dtype or torch.float32),
            data_sha256=parts.data.sha256,
            tokens_sha256=parts.data.tokens_sha256,
            windows=parts.plan.order.sizes,
            plugins=plugins,
            plugin_records=self._run.manager.failures.state_dict(),
            optimizer_groups=optimizer_groups(trained.model, trained.optimizer),
            averages=[
                Average(plugin=plugin, decay=average.decay, asked=averages.asked.get(plugin))
                for plugin, average in averages.by_plugin.items()
            ],
            tensors={
                name: inventory({k: (v.shape, v.dtype) for k, v in part.items()})
                for name, part in tensors.items()
            },
        )

    def _kept_in_step(self) -> list[str]:
        """Active plugins whose state is of the middle of a step. It is saved nevertheless: losing
        the weights would be worse than a resume that is not bit-exact."""
        manager = self._run.manager
        kept = {call.plugin for call in manager.order("apt_state_dict")}
        moved = {call.plugin for hook in REPLAYED for call in manager.order(hook)}
        plugins = sorted(kept & moved)
        if plugins:
            log.warning(
                "this checkpoint was written in the middle of a step, of which %s may have seen a "
                "part: a resume from it is not bit-exact",
                ", ".join(plugins),
            )
        return plugins
