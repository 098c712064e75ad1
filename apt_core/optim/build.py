"""Builds the optimizer of a run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from apt_core.config import Config
from apt_core.kernel import Kernel
from apt_core.metric_names import of_rate
from apt_core.modeling.lr_scale import learning_rate_scales
from apt_core.optim.parameter_groups import parameter_groups
from apt_core.plugin_manager import PluginManager
from apt_core.providers.optimizer import OptimizerProvider
from apt_core.registry import Registry

PLAN = "plan"
"""The key under which a group keeps its initial settings."""


def keep_plan(optimizer: Optimizer) -> None:
    """Store in every group of a new optimizer its settings, which steps and plugins may change,
    under ``PLAN``, and its peak rate as ``initial_lr``."""
    for group in optimizer.param_groups:
        group[PLAN] = {
            key: [*value] if isinstance(value, tuple) else value
            for key, value in group.items()
            if isinstance(value, bool | int | float | str | tuple)
        }
        group["initial_lr"] = group["lr"]


def build_optimizer(kernel: Kernel, model: nn.Module, config: Config | None = None) -> Optimizer:
    """The profile's optimizer of ``model``, whose groups keep their peak rate as ``initial_lr``.
    ``config`` has the settings of the model, by default the profile's."""
    config = config or kernel.config
    width = config.model.d_model if config.training.scale_lr_by_width else None
    scales = learning_rate_scales(model, width)
    optimizer = _optimizer(config, kernel.registry, model, kernel.manager, scales)
    keep_plan(optimizer)
    return optimizer


def measured_optimizer(config: Config, registry: Registry, model: nn.Module) -> Optimizer:
    """The profile's optimizer of ``model``, for measurements: without the groups of plugins and
    the scales of layers, which set rates and so take neither time nor memory."""
    return _optimizer(config, registry, model, PluginManager(), {})


def _optimizer(
    config: Config,
    registry: Registry,
    model: nn.Module,
    plugins: PluginManager,
    scales: Mapping[str, float],
) -> Optimizer:
    training = config.training
    provider: OptimizerProvider = registry.get("optimizer", training.optimizer_name)
    settings = {"learning_rate": training.learning_rate, "weight_decay": training.weight_decay}
    separate = getattr(provider, "separates_matrices", False)
    groups = parameter_groups(model, plugins, scales=scales, separate_matrices=separate, **settings)
    return provider.create(groups, **settings)


def learning_rates(optimizer: Optimizer, learning_rate: float, factor: float) -> dict[str, float]:
    """The rates of a step by the name of their metric: that of the profile, ``learning_rate`` times
    the ``factor`` of the schedule, and those of groups that learn at another one.

    A group is named by what it was planned with (:func:`~apt_core.metric_names.of_rate`). Where a
    plugin has changed the rates of groups of one name, the largest counts.
    """
    rates = {"lr": learning_rate * factor}
    groups = [group for group in optimizer.param_groups if group["params"]]
    peaks = [group.get(PLAN, {}).get("lr", group["initial_lr"]) for group in groups]
    matrices = [bool(group.get("hidden_matrices")) for group in groups]
    largest = max((p for p, is_own in zip(peaks, matrices, strict=True) if is_own), default=0.0)
    for group, peak, is_own in zip(groups, peaks, matrices, strict=True):
        if is_own:
            name = of_rate(peak / largest if largest else 1.0, matrices=True)
        elif peak == learning_rate and group["lr"] == rates["lr"]:
            continue
        else:
            name = of_rate(peak / learning_rate)
        rates[name] = max(float(group["lr"]), rates.get(name, 0.0))
    return rates


def decides_on_device(optimizer: Optimizer, device: torch.device) -> bool:
    """Whether ``optimizer`` can skip a void step on ``device`` without the host. On a CPU the host
    decides, since reading the value costs no wait."""
    marks = ("_step_supports_amp_scaling", "takes_found_inf")  # of torch's fused ones, and our own
    return device.type != "cpu" and any(getattr(optimizer, mark, False) for mark in marks)
