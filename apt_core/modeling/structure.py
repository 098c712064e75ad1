"""Builds the structures of a run's model before and after transforms, on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import nn

from apt_core.config import Config
from apt_core.errors import CheckpointError, ConfigError, Problem
from apt_core.kernel import Kernel
from apt_core.modeling.compose import ModelBuilder
from apt_core.modeling.transforms import ModelTransform
from apt_core.schedules import Schedule

HOOK = "apt_transform_model"


def base_structure(kernel: Kernel, config: Config | None = None) -> nn.Module:
    """The structure of the model at the start of the run; ``config`` replaces the profile."""
    with torch.device("meta"):
        return ModelBuilder(config or kernel.config, kernel.registry).build_model()


def config_after(config: Config, transform: ModelTransform) -> Config:
    """``config`` with the settings of the structure after ``transform``."""
    if not transform.model_settings:
        return config
    model = config.model.model_copy(update=dict(transform.model_settings))
    return config.model_copy(update={"model": model})


def transform_of(
    kernel: Kernel,
    plugin: str,
    structure: nn.Module,
    config: Config | None = None,
    *,
    trains: bool = True,
) -> ModelTransform | None:
    """The transform that ``plugin`` makes of ``structure``, which it may change; None if it leaves
    the model unchanged. ``config`` has the settings of ``structure``, by default the profile's.
    ``trains``: the model is built to be trained.

    A plugin that fails, or whose transform does not fit, is quarantined, and None is returned.
    Raises ConfigError if the plugin refuses the profile, and PluginError if its failure must end
    the run.
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
            trains=trains,
        )
    if transform is None:
        return None

    def checked() -> ModelTransform:
        if not isinstance(transform, ModelTransform):
            raise TypeError(f"it returned a {type(transform).__name__}, not a ModelTransform")
        transform.check(before)
        if unknown := transform.model_settings.keys() - type(kernel.config.model).model_fields:
            raise ValueError(f"model_settings: there is no model.{min(unknown)}")
        return transform

    return manager.attempt(plugin, HOOK, checked)


def structure_after(kernel: Kernel, plugins: Iterable[str]) -> nn.Module:
    """The model's structure once ``plugins`` have transformed it, in this order."""
    structure, config = base_structure(kernel), kernel.config
    for plugin in plugins:
        transform = transform_of(kernel, plugin, structure, config)
        if transform is not None:
            structure, config = transform.model, config_after(config, transform)
    return structure


class MadeSwitch(Protocol):
    """A change of the model that a run has made: by which plugin, and which others were
    ``quarantined`` then."""

    plugin: str
    quarantined: list[str]


AnySwitch = TypeVar("AnySwitch", bound=MadeSwitch)


def require_plugins(kernel: Kernel, plugins: Iterable[str]) -> None:
    """Raise ConfigError unless all ``plugins``, which have changed a checkpoint's model, are
    active."""
    absent = [name for name in plugins if not kernel.manager.has_plugin(name)]
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


def replayed(
    kernel: Kernel, switches: Iterable[AnySwitch], *, trains: bool = True
) -> Iterator[tuple[AnySwitch, ModelTransform]]:
    """Yield each of a run's ``switches`` with the transform that its plugin, which is active, makes
    of the structure before it. Raises CheckpointError if a plugin returns no transform now."""
    manager, structure, config = kernel.manager, base_structure(kernel), kernel.config
    for switch in switches:
        for name in switch.quarantined:
            if manager.has_plugin(name):
                manager.set_state(name, "quarantined", "as in the checkpoint")
        transform = transform_of(kernel, switch.plugin, structure, config, trains=trains)
        if transform is None:
            reason = manager.records[switch.plugin].reason
            raise CheckpointError(
                f"plugin {switch.plugin} changed the structure of the checkpoint's model, "
                f"and does not do so now{f' ({reason})' if reason else ''}"
            )
        structure = copy.deepcopy(transform.model)
        config = config_after(config, transform)
        yield switch, transform


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
