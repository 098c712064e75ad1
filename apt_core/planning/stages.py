"""The stages of a run: which plugins are enabled in each, and what the model then is."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from apt_core.kernel import Kernel
from apt_core.modeling.costs import (
    BACKWARD_AND_FORWARD,
    ModelCost,
    layer_flops,
    layers_of,
)
from apt_core.modeling.structure import base_structure, transform_of, transforming_plugins
from apt_core.modeling.transforms import ModelTransform
from apt_core.schedules import FIRST, Boundary, Horizon, Schedule
from apt_core.types import PluginCosts


@dataclass(frozen=True)
class Structure:
    """A model on the meta device. ``shares`` [parameter name] is the share of a parameter that a
    token passes through, where that is not all of it; ``added`` what the forward of a token
    computes in each layer beyond the model with which the run starts, and ``added_outside`` what it
    does outside of them."""

    model: nn.Module
    added: Sequence[float]
    added_outside: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def first(cls, kernel: Kernel) -> Structure:
        """The model with which the run starts, before any plugin changes it."""
        model = base_structure(kernel)
        return cls(model, [0.0] * len(layers_of(model)))

    def after(self, transform: ModelTransform) -> Structure:
        """What ``transform`` makes of it. The arithmetic that it adds is taken to be in the layers
        whose parameters it changes, in equal parts."""
        old, new = ([_shapes(la) for la in layers_of(m)] for m in (self.model, transform.model))
        shares = {**self.shares, **transform.active_share}
        if len(old) != len(new):
            # Where it added layers or took some away, what each computes is not known.
            outside = self.added_outside + sum(self.added) + transform.added_flops
            return Structure(transform.model, [0.0] * len(new), outside, shares)
        changed = [before != after for before, after in zip(old, new, strict=True)]
        each = transform.added_flops / sum(changed) if any(changed) else 0.0
        return Structure(
            transform.model,
            [a + each * has for a, has in zip(self.added, changed, strict=True)],
            self.added_outside + (0 if any(changed) else transform.added_flops),
            shares,
        )

    @property
    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def active_params(self) -> int:
        """Those that one token passes through."""
        parameters = self.model.named_parameters()
        return round(sum(p.numel() * self.shares.get(name, 1.0) for name, p in parameters))

    def flops_per_token(self, cost: ModelCost) -> int | None:
        """Of training; ``cost`` is that of the model with which the run starts."""
        added = BACKWARD_AND_FORWARD * (sum(self.added) + self.added_outside)
        return None if cost.flops_per_token is None else cost.flops_per_token + round(added)

    def layer_flops(self, kernel: Kernel, seq_len: int) -> list[float] | None:
        """Of training, per token of a sequence of ``seq_len``, by layer; None where unknown."""
        base = layer_flops(kernel, kernel.config.model, seq_len)
        if base is None or len(base) != len(self.added):
            return None
        return [b + BACKWARD_AND_FORWARD * a for b, a in zip(base, self.added, strict=True)]


@dataclass(frozen=True)
class Stage:
    """From one position of the run, ``at`` in ``unit``, to the next. ``costs`` are those of the
    plugins that are enabled; ``switches`` says that one of them has just changed the structure."""

    name: str
    unit: str
    at: int
    structure: Structure
    costs: PluginCosts
    switches: bool = False


def stages(kernel: Kernel, schedule: Schedule) -> Iterator[Stage]:
    """The start, and each moment at which a plugin becomes enabled or disabled, by ``schedule``,
    the kernel's with its horizon.

    The plugins that change the model do so here, one after the other, as the run will have it.
    Raises ConfigError and PluginError where one of them does.
    """
    boundaries = [
        boundary
        for boundary in schedule.boundaries()
        if kernel.manager.has_plugin(boundary.plugin) and _reached(boundary, schedule.horizon)
    ]
    waiting = {boundary.plugin for boundary in boundaries if boundary.enables}
    records = kernel.manager.records.values()
    enabled = {r.name: None for r in records if r.state == "active" and r.name not in waiting}
    structure = Structure.first(kernel)
    transforming = transforming_plugins(kernel, schedule)
    for plugin in transforming:
        if plugin not in waiting:
            structure = _after(kernel, structure, plugin) or structure
    yield Stage("start", "epoch", FIRST["epoch"], structure, plugin_costs(kernel, enabled))
    for boundary in boundaries:
        plugin, changed = boundary.plugin, None
        if boundary.enables:
            enabled[plugin] = None
            if plugin in transforming:
                changed = _after(kernel, structure, plugin)
                structure = changed or structure
        else:
            enabled.pop(plugin, None)
        yield Stage(
            f"{'enable' if boundary.enables else 'disable'} {plugin}",
            boundary.unit,
            boundary.at,
            structure,
            plugin_costs(kernel, enabled),
            changed is not None,
        )


def _reached(boundary: Boundary, horizon: Horizon) -> bool:
    """Does the run come to it, as far as ``horizon`` tells?"""
    unit = boundary.unit
    here, last = horizon.first_step_from(boundary.at, unit), horizon.last("step")
    if here is None:  # without the data, each unit by itself
        here, last = boundary.at, horizon.last(unit)
    return last is None or here <= last


def _after(kernel: Kernel, structure: Structure, plugin: str) -> Structure | None:
    transform = transform_of(kernel, plugin, copy.deepcopy(structure.model))
    return None if transform is None else structure.after(transform)


def plugin_costs(kernel: Kernel, plugins: Iterable[str]) -> PluginCosts:
    """What the plugins that are enabled say that they take, together."""
    asked = (kernel.manager.call_plugin(p, "apt_costs", config=kernel.config) for p in plugins)
    return sum(filter(None, asked), PluginCosts())


def _shapes(layer: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()]
