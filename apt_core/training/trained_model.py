"""The model that a run trains, and every object that refers to its parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apt_core.errors import TrainingError
from apt_core.kernel import Kernel
from apt_core.modeling.casts import KeptCasts
from apt_core.optim.averages import Averages, WeightAverage
from apt_core.parallel.gradient_sum import GradientSum
from apt_core.parallel.world import World, local_part
from apt_core.runs.checkpoint_parts import listed, names_not_finite
from apt_core.torch_state import TorchWatch
from apt_core.training.curriculum.model_modes import ModelModes
from apt_core.training.prepare import Built, loop_forward
from apt_core.training.step.finite_guard import FiniteGuard
from apt_core.training.step.gradients import Gradients


class TrainedModel:
    """The model, its optimizer, and the objects made for them, which a switch replaces together.

    ``forward`` computes the model, compiled or not; ``averages`` are moving averages of its
    weights; ``guard`` skips steps that are not finite; ``gradient_sum`` adds up the gradients of
    several processes (None in a run of one); ``modes`` records the parameters that plugins froze
    and the modules that they put into eval mode.
    """

    def __init__(
        self,
        kernel: Kernel,
        built: Built,
        device: torch.device,
        world: World,
        watch: TorchWatch | None,
    ) -> None:
        self._kernel, self._world, self._watch = kernel, world, watch
        self._device = device
        self._training = kernel.config.training
        self.modes = ModelModes()
        # An optimizer may make the state of all parameters at once, and never again.
        self._makes_states = not built.optimizer.state
        self._take(built)
        decay = self._training.ema_decay
        self.averages = Averages(None if decay is None else WeightAverage(self.model, decay))

    def _take(self, built: Built) -> None:
        self.model, self.optimizer, self.forward = built.model, built.optimizer, built.forward
        model = built.model
        if self._watch is not None:
            self._watch.model = model
        self._known = dict(model.named_parameters())
        self.casts = KeptCasts(model)
        self.gradient_sum = GradientSum(model, self._world) if self._world.size > 1 else None
        self.guard = FiniteGuard(
            built.optimizer, self._device, window=self._training.log_every_steps
        )
        self.gradients = Gradients(built.optimizer, self._training.gradient_clip)

    def replace(self, model: nn.Module, optimizer: Optimizer, averages: Averages) -> None:
        """Replace the model, its optimizer and its averages."""
        skipped = self.guard.state()
        del self.forward  # free the old model before the new one is compiled
        self.averages = averages
        forward = loop_forward(self._kernel, model, self._device, self._world)
        self._take(Built(model, optimizer, forward))
        self.guard.load(*skipped)
        if self._watch is not None and self._watch.stepping:
            self._watch.start_steps(model)

    def forget_states(self, names: Collection[str]) -> None:
        """Drop the gradients of these parameters, and what the optimizer keeps of them, if it can
        make that anew."""
        for name, parameter in self.model.named_parameters():
            if name in names:
                parameter.grad = None
                if self._makes_states:
                    self.optimizer.state.pop(parameter, None)

    def average(self, plugin: str, decay: float) -> WeightAverage:
        """The moving average of the weights that belongs to ``plugin``; made at the first call."""
        average = self.averages.of_plugin(plugin, decay, self.model)
        average.compute = self.forward.with_weights
        return average

    def update_averages(self, step: int, void: bool | Tensor) -> None:
        """Update the averages after ``step``, which may be ``void``; those of plugins while the
        plugin is active."""
        if self.averages.ema is not None:
            self.averages.ema.update(step, void)
        records = self._kernel.manager.records
        for plugin, average in self.averages.by_plugin.items():
            if records[plugin].state == "active":
                average.update(step, void)

    @property
    def num_parameters(self) -> int:
        """The number of the model's parameters, counted over the shards of all processes."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def unknown_parameters(self) -> list[str]:
        """Names of parameters that were added to the model after its optimizer was made."""
        # FSDP2 swaps the parameter objects while it computes, so names are compared.
        by_name = self._world.sharding == "fsdp"
        return [
            name
            for name, parameter in self.model.named_parameters()
            if name not in self._known or not (by_name or self._known[name] is parameter)
        ]

    def require_known_parameters(self) -> None:
        """Raise TrainingError for parameters that the optimizer does not have: they would never
        learn, and a resume could not restore them."""
        if unknown := self.unknown_parameters():
            raise TrainingError(
                f"the optimizer does not have {listed(unknown)}: a plugin has put other "
                "parameters into the model in mid-run, which would never learn. Let a provider "
                "build them (apt_register_providers), or a transform (apt_transform_model)"
            )

    def require_all_processes(self) -> None:
        """Raise ProcessLostError if not all processes took part in a step; waits for the device."""
        if self.gradient_sum is not None:
            self.gradient_sum.require_all()

    def not_finite(self, *, everywhere: bool = False) -> list[str]:
        """Names of parameters and of their averages that are not finite in this process, or with
        ``everywhere``, which all processes must call together, in any process. Buffers are not
        looked at: a mask may be infinite.
        """
        kept: dict[str, Mapping[str, Tensor]] = {"": dict(self.model.named_parameters())}
        if self.averages.ema is not None:
            kept["average of "] = self.averages.ema.values
        by_plugin = self.averages.by_plugin.items()
        kept |= {f"{plugin}'s average of ": average.values for plugin, average in by_plugin}
        named = {f"{what}{n}": tensor for what, own in kept.items() for n, tensor in own.items()}
        bad = names_not_finite(named)
        return [*dict.fromkeys(chain(*self._world.gather(bad)))] if everywhere else bad

    def nbytes_by_part(self) -> dict[str, int]:
        """Bytes that this process holds for weights, gradients, optimizer state and averages."""
        model, states = self.model, self.optimizer.state.values()
        parts = {
            "weights": [*model.parameters(), *model.buffers()],
            "gradients": [parameter.grad for parameter in model.parameters()],
            "optimizer": [value for state in states for value in state.values()],
            "averages": [value for a in self.averages.all for value in a.values.values()],
        }
        return {
            part: sum(local_part(t.detach()).nbytes for t in values if isinstance(t, torch.Tensor))
            for part, values in parts.items()
        }
