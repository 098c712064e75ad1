"""Which parameters learn at which rate and decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from apt_core.plugin_manager import PluginManager


def parameter_groups(
    model: nn.Module,
    manager: PluginManager,
    *,
    learning_rate: float,
    weight_decay: float,
    scales: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """The optimizer's groups: those that plugins ask for, then the rest by their rate.

    ``scales`` are factors on the learning rate by parameter name; the decay of a step stays what
    it is without them. Weight decay is for matrices only: a decayed gain or bias pulls towards
    zero what has no reason to be there. A plugin's group may set ``lr_scale`` (a further factor)
    and ``weight_decay``.
    """
    scales = scales or {}
    left = {id(p): (name, p) for name, p in model.named_parameters() if p.requires_grad}
    own = {id(parameter) for parameter in model.parameters()}
    groups: dict[tuple[float, float], list[Tensor]] = {}

    def add(name: str, parameter: Tensor, lr_scale: float, decay: float) -> None:
        scale = scales.get(name, 1.0)
        key = (learning_rate * lr_scale * scale, decay / scale)
        groups.setdefault(key, []).append(parameter)

    for plugin, asked in manager.call_each("apt_param_groups", model=model):
        try:
            planned = [_plugin_group(group, weight_decay) for group in asked]
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            manager.fail(plugin, "apt_param_groups", error)
            continue
        strangers = [p for group in planned for p in group[0] if id(p) not in own]
        if strangers:
            message = f"{len(strangers)} of its tensors are no parameters of the model"
            manager.fail(plugin, "apt_param_groups", ValueError(message))
            continue
        for parameters, lr_scale, decay in planned:
            for parameter in parameters:
                if id(parameter) in left:
                    add(*left.pop(id(parameter)), lr_scale, decay)
    for name, parameter in left.values():
        add(name, parameter, 1.0, weight_decay if parameter.ndim >= 2 else 0.0)
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def _plugin_group(
    group: Mapping[str, Any], weight_decay: float
) -> tuple[list[Tensor], float, float]:
    unknown = set(group) - {"params", "lr_scale", "weight_decay"}
    if unknown:
        raise ValueError(f"a parameter group has the unknown keys {sorted(unknown)}")
    decay = float(group.get("weight_decay", weight_decay))
    lr_scale = float(group.get("lr_scale", 1.0))
    if decay < 0 or lr_scale < 0:
        raise ValueError(f"lr_scale {lr_scale} and weight_decay {decay} must not be negative")
    return list(group["params"]), lr_scale, decay
