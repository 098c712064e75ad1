"""Switches of the model's structure in mid-run, by plugins that become enabled, and their replay
when a checkpoint is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from apt_core.data.batches import Batch
from apt_core.device import is_out_of_memory
from apt_core.errors import CheckpointError, ConfigError, Problem
from apt_core.log import get_logger
from apt_core.modeling.calling import losses_in_fp32
from apt_core.modeling.carry import (
    carry_average,
    carry_frozen,
    carry_optimizer_state,
    materialize,
)
from apt_core.modeling.seeds import fp32_products
from apt_core.modeling.structure import HOOK, base_structure, transform_of
from apt_core.modeling.transforms import ModelTransform
from apt_core.optim.averages import WeightAverage
from apt_core.optim.build import build_optimizer
from apt_core.plugin_records import PluginRecord
from apt_core.training.gathering import gathered_dtype

if TYPE_CHECKING:
    from apt_core.training.trainer import Trainer

log = get_logger("apt.training")


@dataclass(frozen=True)
class _Made:
    """What takes the place of all that holds the parameters of the run's model."""

    optimizer: Optimizer
    average: WeightAverage | None
    averages: dict[str, WeightAverage]


class Switching:
    """Applies the transforms of plugins to the run.

    ``switches`` are those that were made, in order, as manifests and checkpoints have them:
    ``plugin``, the first ``epoch`` and ``step`` of the new structure, ``loss_before`` and
    ``loss_after`` on a fixed batch of held-out text (nats per token, in fp32), and the plugins that
    were ``quarantined``, which had no say in the new optimizer. ``making`` is the plugin for
    which a second model is made, until the run has taken it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._structure: nn.Module | None = None
        self.switches: list[dict[str, Any]] = []
        self.making = ""

    def switch(self, plugin: str) -> bool:
        """Let ``plugin``, which is due, change the model; False if it failed, in which case nothing
        is changed and it is quarantined in every process. The gradients of the last step go."""
        # The last digits of fp32 tell the old model from the new one.
        with fp32_products(self._trainer.device, tf32=False):
            taken = self._switch(plugin)
        self.making = ""  # not after an exception, which ends the run and is to be explained
        return taken

    def _switch(self, plugin: str) -> bool:
        trainer, manager = self._trainer, self._trainer.manager
        if not manager.implements(plugin, HOOK) or plugin in self.plugins:
            return True
        try:
            transform = self._transform(plugin)
        except ConfigError as error:
            # Bad input at the start of a run, and a failure in the middle of it.
            manager.failures.fail(plugin, HOOK, RuntimeError(str(error)))
            transform = None
        if not self._agreed(plugin):
            return False
        if transform is None:
            return True
        self.making = plugin
        # Those of the last step are of no use any more, and take room.
        trainer.optimizer.zero_grad(set_to_none=True)
        batch = trainer.evaluator.fixed_batch().to(trainer.device)
        before = fixed_loss(trainer, trainer.model, batch)
        after = float("nan")
        others = self._others(plugin)
        try:
            structure, model = self._make_model(transform)
        except (Exception, SystemExit, GeneratorExit) as error:
            self._failed(plugin, others, error)
        # Under FSDP2 what follows needs all processes.
        if not self._agreed(plugin):
            self._restore(others)
            return False
        try:
            after = fixed_loss(trainer, model, batch)
            # Not "difference > tolerance", of which NaN knows nothing.
            tolerance = max(transform.tolerance, abs(before) * rounding(trainer.model, model))
            if not abs(after - before) <= tolerance:
                raise ValueError(
                    f"the loss of a fixed batch went from {before:.7g} to {after:.7g}, by more "
                    f"than its tolerance of {tolerance:g}"
                )
        except (Exception, SystemExit, GeneratorExit) as error:
            self._failed(plugin, others, error)
        if not self._agreed(plugin):
            self._restore(others)
            return False
        # Only now: the activations of the losses and the new state need not be there together.
        try:
            made = self._make_rest(transform, model)
            self._refuse_if_changed(others)
        except (Exception, SystemExit, GeneratorExit) as error:
            self._failed(plugin, others, error)
        if not self._agreed(plugin):
            self._restore(others)
            return False
        grown = [sum(p.numel() for p in m.parameters()) for m in (trainer.model, model)]
        # Before the rest: a run that dies in it saves the new model.
        self.making = ""
        self.switches.append(
            {
                "plugin": plugin,
                "epoch": 1 + trainer.step // trainer.parts.plan.steps_per_epoch,
                "step": trainer.step + 1,
                "loss_before": before,
                "loss_after": after,
                "quarantined": [r.name for r in self._quarantined()],
            }
        )
        self._adopt(structure, model, made, transform)
        log.info(
            "%s changed the model: %s parameters, %s before; loss of a fixed batch %.6f, "
            "%.6f before (%+.1e)",
            plugin,
            f"{grown[1]:,}",
            f"{grown[0]:,}",
            after,
            before,
            after - before,
        )
        return True

    def check_plugins(self, switches: Sequence[Mapping[str, Any]]) -> None:
        """Raise ConfigError where a plugin that made one of ``switches`` is not active."""
        manager = self._trainer.manager
        absent = [s["plugin"] for s in switches if not manager.has_plugin(s["plugin"])]
        if absent:
            raise ConfigError(
                [
                    Problem(
                        f"plugin {name} has changed the structure of the checkpoint's model, and "
                        "is not active here",
                        key="plugins",
                        hint=f"--plugin {name}, with the settings that it had",
                    )
                    for name in absent
                ]
            )

    def replay(self, switches: Sequence[Mapping[str, Any]]) -> None:
        """Give the model the structure that it had after ``switches``, whose plugins are active,
        with weights that are to be loaded. Raises CheckpointError where one does not make it
        again."""
        manager = self._trainer.manager
        for switch in switches:
            for name in switch.get("quarantined", []):
                if manager.has_plugin(name):
                    manager.set_state(name, "quarantined", "as in the checkpoint")
            transform = self._transform(switch["plugin"])
            if transform is None:
                reason = manager.records[switch["plugin"]].reason
                raise CheckpointError(
                    f"plugin {switch['plugin']} changed the structure of the checkpoint's model, "
                    f"and does not do so now{f' ({reason})' if reason else ''}"
                )
            structure, model = self._make_model(transform, carry=False)
            made = self._make_rest(transform, model, carry=False)
            self._adopt(structure, model, made, transform)
            self.switches.append(dict(switch))

    @property
    def plugins(self) -> list[str]:
        """Those that have changed the model, in order."""
        return [switch["plugin"] for switch in self.switches]

    def _transform(self, plugin: str) -> ModelTransform | None:
        """What the plugin makes of a copy of the present structure."""
        kernel = self._trainer.kernel
        if self._structure is None:
            self._structure = base_structure(kernel)
        return transform_of(kernel, plugin, copy.deepcopy(self._structure))

    def _quarantined(self) -> list[PluginRecord]:
        records = self._trainer.manager.records.values()
        return [record for record in records if record.state == "quarantined"]

    def _others(self, plugin: str) -> dict[str, tuple[str, str, int]]:
        """State, reason and number of failures of all plugins but this one."""
        records = self._trainer.manager.records.values()
        return {r.name: (r.state, r.reason, len(r.failures)) for r in records if r.name != plugin}

    def _refuse_if_changed(self, others: Mapping[str, tuple[str, str, int]]) -> None:
        """Raise ValueError where one of ``others`` failed on the new model."""
        lost = [r for r in self._quarantined() if r.name in others]
        new = [f"{r.name}: {r.reason}" for r in lost if others[r.name][0] != r.state]
        if new:
            raise ValueError(f"the new model is one that other plugins fail on: {'; '.join(new)}")

    def _restore(self, others: Mapping[str, tuple[str, str, int]]) -> None:
        """Let plugins go on whose failure was about a model that the run does not get."""
        manager = self._trainer.manager
        for name, (state, reason, failures) in others.items():
            record = manager.records[name]
            if record.state != state:
                log.warning("plugin %s goes on: the model that it failed on is not taken", name)
                manager.set_state(name, state, reason)
                del record.failures[failures:]

    def _failed(
        self, plugin: str, others: Mapping[str, tuple[str, str, int]], error: BaseException
    ) -> None:
        """Count an error in making or trying the new model as a failure of ``plugin``; raise those
        that are to end the run."""
        if is_out_of_memory(error) or self._trainer.manager.failures.lets_through(error):
            raise error
        self._restore(others)
        # A ConfigError of the hook is bad input; here it comes too late to be that.
        told = RuntimeError(str(error)) if isinstance(error, ConfigError) else error
        self._trainer.manager.failures.fail(plugin, HOOK, told)

    def _agreed(self, plugin: str) -> bool:
        """Is the plugin well in all processes? Where it is not in one, it is quarantined in all."""
        trainer, record = self._trainer, self._trainer.manager.records[plugin]
        quarantined = record.state == "quarantined"
        reasons = trainer.world.gather(record.reason if quarantined else "")
        for rank, reason in enumerate(reasons):
            if reason and record.state != "quarantined":
                trainer.manager.set_state(plugin, "quarantined", f"{reason}, in process {rank}")
        if any(reasons):
            log.warning("the model stays as it is, without what %s would have changed", plugin)
        return not any(reasons)

    def _make_model(
        self, transform: ModelTransform, *, carry: bool = True
    ) -> tuple[nn.Module, nn.Module]:
        """The new structure on the meta device, and the model."""
        trainer, config = self._trainer, self._trainer.config
        structure = copy.deepcopy(transform.model)
        faults: list[Exception] = []
        model = materialize(
            transform,
            trainer.model,
            carry=carry,
            faults=faults,
            seed=config.training.seed,
            num_layers=config.model.num_layers,
            device=trainer.device,
            world=trainer.world,
            gathered=lambda new: gathered_dtype(
                trainer.kernel, new, trainer.device, trainer.parts.dtype, trainer.world
            ),
        )
        if faults:
            raise faults[0]
        carry_frozen(transform, trainer.model, model)
        return structure, model

    def _make_rest(
        self, transform: ModelTransform, model: nn.Module, *, carry: bool = True
    ) -> _Made:
        trainer, kernel = self._trainer, self._trainer.kernel
        faults: list[Exception] = []
        optimizer = build_optimizer(kernel, model)
        if carry:
            name = kernel.config.training.optimizer_name
            moments = trainer.registry.get("optimizer", name).moments
            carry_optimizer_state(
                transform, trainer.model, trainer.optimizer, model, optimizer, moments, faults
            )

        def moved(average: WeightAverage) -> WeightAverage:
            values = carry_average(transform, average.values, model, faults) if carry else None
            return WeightAverage(model, average.decay, warmup=average.warmup, values=values)

        made = _Made(
            optimizer,
            None if trainer.ema is None else moved(trainer.ema),
            {plugin: moved(average) for plugin, average in trainer.averages.items()},
        )
        if faults:
            raise faults[0]
        return made

    def _adopt(
        self, structure: nn.Module, model: nn.Module, made: _Made, transform: ModelTransform
    ) -> None:
        trainer = self._trainer
        self._structure = structure
        trainer.modes.carry(transform, trainer.model)
        trainer.ema, trainer.averages = made.average, made.averages
        trainer.switch_to(model, made.optimizer)
        trainer.step_log.structure_changed(transform.added_flops)


def rounding(*models: nn.Module) -> float:
    """The share by which rounding may change the loss of ``models``: none in fp32. Layers that
    FSDP2 gathers in another type cannot compute in it; the rehearsal before the run has."""
    dtypes = [getattr(model, "gathered_dtype", None) for model in models]
    return max(0.0 if dtype is None else torch.finfo(dtype).eps for dtype in dtypes)


def fixed_loss(trainer: Trainer, model: nn.Module, batch: Batch) -> float:
    """The mean cross-entropy of ``batch`` in nats per token, computed in eval mode and in fp32, or
    in the type in which FSDP2 gathers the layers."""
    try:
        losses = losses_in_fp32(model, batch)
    finally:
        trainer.world.reshard(model)
    # The last digits of a sum in fp32 are what is to be compared.
    return float(losses.cpu().double().sum() / batch.num_targets)
