"""The structures that a run's model goes through, on the meta device: nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from apt_core.config import Config
from apt_core.kernel import Kernel
from apt_core.modeling.compose import ModelBuilder
from apt_core.modeling.transforms import ModelTransform
from apt_core.schedules import Schedule

HOOK = "apt_transform_model"


def base_structure(kernel: Kernel, config: Config | None = None) -> nn.Module:
    """The model with which the run starts; ``config`` stands in for the profile."""
    with torch.device("meta"):
        return ModelBuilder(config or kernel.config, kernel.registry).build_model()


def transform_of(
    kernel: Kernel, plugin: str, structure: nn.Module, config: Config | None = None
) -> ModelTransform | None:
    """What ``plugin`` makes of ``structure``, which is given away with this call; None where it
    leaves the model as it is.

    A plugin that fails, or whose transform does not fit, is quarantined, and the answer is None.
    Raises ConfigError where the plugin finds that the profile is wrong, and PluginError where its
    failure is to end the run.
    """
    before = {name: parameter.shape for name, parameter in structure.named_parameters()}
    manager = kernel.manager
    with torch.device("meta"):
        transform = manager.call_plugin(
            plugin,
            HOOK,
            model=structure,
            config=config or kernel.config,
            registry=kernel.registry,
        )
    if transform is None:
        return None

    def checked() -> ModelTransform:
        if not isinstance(transform, ModelTransform):
            raise TypeError(f"it returned a {type(transform).__name__}, not a ModelTransform")
        transform.check(before)
        return transform

    return manager.attempt(plugin, HOOK, checked)


def structure_after(
    kernel: Kernel, plugins: Iterable[str], config: Config | None = None
) -> nn.Module:
    """The model's structure once ``plugins`` have transformed it, in this order."""
    structure = base_structure(kernel, config)
    for plugin in plugins:
        transform = transform_of(kernel, plugin, structure, config)
        if transform is not None:
            structure = transform.model
    return structure


def transforming_plugins(kernel: Kernel, schedule: Schedule) -> list[str]:
    """The plugins that may transform the model, in the order in which they become enabled by
    ``schedule``, the kernel's with its horizon."""
    manager = kernel.manager
    able = [
        record.name
        for record in manager.records.values()
        if manager.implements(record.name, HOOK) and record.state in ("active", "dormant")
    ]
    moments = [boundary.plugin for boundary in schedule.boundaries() if boundary.enables]
    from_the_start = sorted(name for name in able if name not in moments)
    return from_the_start + [name for name in moments if name in able]
