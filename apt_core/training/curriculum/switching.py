"""Switches the model's structure in mid-run when a plugin is enabled, and replays the switches of a
checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from apt_core.data.batches import Batch
from apt_core.device import is_out_of_memory
from apt_core.errors import ConfigError
from apt_core.log import get_logger
from apt_core.modeling.calling import losses_in_fp32
from apt_core.modeling.carry import (
    carry_average,
    carry_frozen,
    carry_optimizer_state,
    materialize,
)
from apt_core.modeling.costs import model_cost
from apt_core.modeling.seeds import fp32_products
from apt_core.modeling.structure import (
    HOOK,
    base_structure,
    config_after,
    replayed,
    transform_of,
)
from apt_core.modeling.transforms import ModelTransform
from apt_core.optim.averages import Averages, WeightAverage
from apt_core.optim.build import build_optimizer
from apt_core.parallel.world import World
from apt_core.plugin_records import PluginRecord
from apt_core.providers.tokenizer import TokenizerProvider
from apt_core.runs.run_state import Switch
from apt_core.training.context import RunContext
from apt_core.training.gathering import gathered_dtype
from apt_core.training.step.usage import Usage

log = get_logger("apt.training")


class Switching:
    """Applies the transforms of plugins to the run, and records them in ``progress``.

    ``fixed_batch`` returns the held-out batch whose loss is compared before and after a switch.
    ``making`` names the plugin while a second model exists for its switch.
    """

    def __init__(self, run: RunContext, usage: Usage, fixed_batch: Callable[[], Batch]) -> None:
        self._run, self._usage, self._fixed_batch = run, usage, fixed_batch
        self._device, self._dtype = run.parts.device, run.parts.dtype
        self._steps_per_epoch = run.parts.plan.steps_per_epoch
        self._structure: nn.Module | None = None
        self._config = run.kernel.config  # with the sizes of the present structure
        self.making = ""

    def switch(self, plugin: str) -> bool:
        """Apply the transform of ``plugin``, which is due. Returns False if it failed: the model is
        unchanged and the plugin is quarantined in every process. Clears the gradients."""
        # The comparison of the losses needs full fp32.
        with fp32_products(self._device, tf32=False):
            taken = self._switch(plugin)
        self.making = ""  # kept after an exception, whose message names the plugin
        return taken

    def _switch(self, plugin: str) -> bool:
        manager, trained = self._run.manager, self._run.trained
        if not manager.implements(plugin, HOOK) or plugin in self.plugins:
            return True
        try:
            transform = self._transform(plugin)
        except ConfigError as error:
            # A ConfigError is bad input at the start of a run, but a plugin's failure in mid-run.
            manager.failures.fail(plugin, HOOK, RuntimeError(str(error)))
            transform = None
        if not self._agreed(plugin):
            return False
        if transform is None:
            return True
        self.making = plugin
        # The last step's gradients are not needed any more: free their memory.
        trained.optimizer.zero_grad(set_to_none=True)
        batch = self._fixed_batch().to(self._device)
        ids = transform.compared_ids
        before = fixed_loss(trained.model, batch, self._run.world, ids)
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
            after = fixed_loss(model, batch, self._run.world, ids)
            # Negated, so that NaN counts as beyond the tolerance.
            tolerance = max(transform.tolerance, abs(before) * rounding(trained.model, model))
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
        # Made after the losses, so that their activations and the new state never coexist.
        try:
            optimizer, averages = self._make_rest(transform, model)
            self._refuse_if_changed(others)
        except (Exception, SystemExit, GeneratorExit) as error:
            self._failed(plugin, others, error)
        if not self._agreed(plugin):
            self._restore(others)
            return False
        grown = [sum(p.numel() for p in m.parameters()) for m in (trained.model, model)]
        # Recorded before the model is replaced: a run that fails in between saves the new model.
        self.making = ""
        self._run.progress.transforms.append(
            Switch(
                plugin=plugin,
                epoch=1 + self._run.progress.step // self._steps_per_epoch,
                step=self._run.progress.step + 1,
                loss_before=before,
                loss_after=after,
                quarantined=[r.name for r in self._quarantined()],
            )
        )
        self._adopt(structure, model, optimizer, averages, transform)
        switch = self._run.progress.transforms[-1]
        self._run.events.record(
            "switched",
            f"{plugin} changed the model: {grown[1]:,} parameters, {grown[0]:,} before; loss of a "
            f"fixed batch{'' if ids is None else f' over {ids:,} ids'} {after:.6f}, {before:.6f} "
            f"before ({after - before:+.1e})",
            step=switch.step,
            log=log,
            plugin=plugin,
            epoch=switch.epoch,
            parameters=grown[1],
            parameters_before=grown[0],
            loss_before=before,
            loss_after=after,
        )
        return True

    def replay(self, switches: Sequence[Switch]) -> None:
        """Apply ``switches``, whose plugins are active, to the model's structure; the weights are
        loaded later. Raises CheckpointError if a plugin returns no transform now."""
        for switch, transform in replayed(self._run.kernel, switches):
            structure, model = self._make_model(transform, carry=False)
            optimizer, averages = self._make_rest(transform, model, carry=False)
            self._adopt(structure, model, optimizer, averages, transform)
            self._run.progress.transforms.append(switch)

    def require_vocabulary(self, tokenizer: TokenizerProvider) -> None:
        """Raise ConfigError if the present model has fewer ids than ``tokenizer``."""
        size = self._config.model.vocab_size
        if tokenizer.vocab_size > size:
            raise ConfigError(
                f"is {size} until the model grows, and the tokenizer has "
                f"{tokenizer.vocab_size} ids",
                key="model.vocab_size",
                hint="let it grow before the first step: take its schedules.enable_… out",
            )

    @property
    def plugins(self) -> list[str]:
        """The plugins that have changed the model, in order."""
        return [switch.plugin for switch in self._run.progress.transforms]

    def _transform(self, plugin: str) -> ModelTransform | None:
        """The plugin's transform of a copy of the present structure."""
        if self._structure is None:
            self._structure = base_structure(self._run.kernel)
        structure = copy.deepcopy(self._structure)
        return transform_of(self._run.kernel, plugin, structure, self._config)

    def _quarantined(self) -> list[PluginRecord]:
        records = self._run.manager.records.values()
        return [record for record in records if record.state == "quarantined"]

    def _others(self, plugin: str) -> dict[str, tuple[str, str, int]]:
        """State, reason and number of failures of all plugins but this one."""
        records = self._run.manager.records.values()
        return {r.name: (r.state, r.reason, len(r.failures)) for r in records if r.name != plugin}

    def _refuse_if_changed(self, others: Mapping[str, tuple[str, str, int]]) -> None:
        """Raise ValueError where one of ``others`` failed on the new model."""
        lost = [r for r in self._quarantined() if r.name in others]
        new = [f"{r.name}: {r.reason}" for r in lost if others[r.name][0] != r.state]
        if new:
            raise ValueError(f"the new model is one that other plugins fail on: {'; '.join(new)}")

    def _restore(self, others: Mapping[str, tuple[str, str, int]]) -> None:
        """Restore the states of plugins that failed on a model that is not used."""
        manager = self._run.manager
        for name, (state, reason, failures) in others.items():
            record = manager.records[name]
            if record.state != state:
                log.warning("plugin %s goes on: the model that it failed on is not taken", name)
                manager.set_state(name, state, reason)
                del record.failures[failures:]

    def _failed(
        self, plugin: str, others: Mapping[str, tuple[str, str, int]], error: BaseException
    ) -> None:
        """Count an error in making or trying the new model as a failure of ``plugin``; raise it if
        it must end the run."""
        if is_out_of_memory(error) or self._run.manager.failures.lets_through(error):
            raise error
        self._restore(others)
        # fail() would take a ConfigError for bad input, which it is not in mid-run.
        told = RuntimeError(str(error)) if isinstance(error, ConfigError) else error
        self._run.manager.failures.fail(plugin, HOOK, told)

    def _agreed(self, plugin: str) -> bool:
        """Whether the plugin is quarantined in no process; otherwise quarantine it in all."""
        record = self._run.manager.records[plugin]
        quarantined = record.state == "quarantined"
        reasons = self._run.world.gather(record.reason if quarantined else "")
        for rank, reason in enumerate(reasons):
            if reason and record.state != "quarantined":
                self._run.manager.set_state(plugin, "quarantined", f"{reason}, in process {rank}")
        if any(reasons):
            log.warning("the model stays as it is, without what %s would have changed", plugin)
        return not any(reasons)

    def _make_model(
        self, transform: ModelTransform, *, carry: bool = True
    ) -> tuple[nn.Module, nn.Module]:
        """The new structure on the meta device, and the new model with its weights."""
        config, old = config_after(self._config, transform), self._run.trained.model
        structure = copy.deepcopy(transform.model)
        faults: list[Exception] = []
        model = materialize(
            transform,
            old,
            carry=carry,
            faults=faults,
            seed=config.training.seed,
            num_layers=config.model.num_layers,
            device=self._device,
            world=self._run.world,
            gathered=lambda new: gathered_dtype(
                self._run.kernel, new, self._device, self._dtype, self._run.world
            ),
        )
        if faults:
            raise faults[0]
        carry_frozen(transform, old, model)
        return structure, model

    def _make_rest(
        self, transform: ModelTransform, model: nn.Module, *, carry: bool = True
    ) -> tuple[Optimizer, Averages]:
        """The optimizer and the averages of the new ``model``."""
        kernel, trained = self._run.kernel, self._run.trained
        faults: list[Exception] = []
        optimizer = build_optimizer(kernel, model, config_after(self._config, transform))
        if carry:
            name = kernel.config.training.optimizer_name
            moments = kernel.registry.get("optimizer", name).moments
            carry_optimizer_state(
                transform, trained.model, trained.optimizer, model, optimizer, moments, faults
            )

        def moved(average: WeightAverage) -> WeightAverage:
            values = carry_average(transform, average.values, model, faults) if carry else None
            return WeightAverage(model, average.decay, warmup=average.warmup, values=values)

        averages = trained.averages.moved(moved)
        if faults:
            raise faults[0]
        return optimizer, averages

    def _adopt(
        self,
        structure: nn.Module,
        model: nn.Module,
        optimizer: Optimizer,
        averages: Averages,
        transform: ModelTransform,
    ) -> None:
        config = config_after(self._config, transform)
        if config is not self._config:
            kernel = self._run.kernel
            self._usage.resize(
                *(model_cost(kernel, c).flops_per_token for c in (self._config, config))
            )
        self._structure, self._config = structure, config
        self._run.trained.modes.carry(transform, self._run.trained.model)
        self._run.trained.replace(model, optimizer, averages)
        self._usage.add_flops(transform.added_flops)


def rounding(*models: nn.Module) -> float:
    """The relative change of the loss that rounding may cause in ``models``: none in fp32. Layers
    that FSDP2 gathers in another dtype cannot compute in fp32."""
    dtypes = [getattr(model, "gathered_dtype", None) for model in models]
    return max(0.0 if dtype is None else torch.finfo(dtype).eps for dtype in dtypes)


def fixed_loss(model: nn.Module, batch: Batch, world: World, ids: int | None = None) -> float:
    """The mean cross-entropy of ``batch`` in nats per token, computed in eval mode and in fp32, or
    in the dtype in which FSDP2 gathers the layers; over the first ``ids`` alone, if given."""
    try:
        losses = losses_in_fp32(model, batch, ids)
    finally:
        world.reshard(model)
    # Summed in fp64: the comparison needs the last digits of fp32.
    return float(losses.cpu().double().sum() / batch.num_targets)
