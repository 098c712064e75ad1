"""Divides the parameters of a model into groups by learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from apt_core.modeling.blocks import block_stack
from apt_core.modeling.lr_scale import declared
from apt_core.plugin_manager import PluginManager


class _Key(NamedTuple):
    """The settings that the parameters of a group share. ``stacked`` is set for hidden matrices
    only; their ``lr`` is a factor, and their ``decay`` None unless a plugin asks for one."""

    lr: float
    decay: float | None
    stacked: int | None = None


def parameter_groups(
    model: nn.Module,
    manager: PluginManager,
    *,
    learning_rate: float,
    weight_decay: float,
    scales: Mapping[str, float] | None = None,
    separate_matrices: bool = False,
) -> list[dict[str, Any]]:
    """The optimizer's groups: those of plugins, then the other parameters by rate and decay.

    ``scales`` are factors on the learning rate by parameter name; they do not change the decay of
    a step. Only matrices are decayed: gains and biases need not be near zero. A plugin's group may
    set ``lr_scale`` (a further factor) and ``weight_decay``.

    With ``separate_matrices`` hidden matrices (:func:`hidden_matrices`) are in groups of their own,
    ``{"params", "hidden_matrices": True, "stacked", "lr_scale"}``, with a ``weight_decay`` where a
    plugin asks for one: rate and decay are the optimizer's own, and ``scales`` do not apply.
    """
    scales = scales or {}
    # Frozen parameters too: they do not move without a gradient, and a plugin may thaw them.
    left = {id(p): (name, p) for name, p in model.named_parameters()}
    matrices = hidden_matrices(model) if separate_matrices else {}
    groups: dict[_Key, list[Tensor]] = {}

    def add(name: str, parameter: Tensor, lr_scale: float, decay: float | None) -> None:
        if name in matrices:
            key = _Key(lr_scale, decay, matrices[name])
        else:
            if decay is None:
                decay = weight_decay if parameter.ndim >= 2 else 0.0
            scale = scales.get(name, 1.0)
            key = _Key(learning_rate * lr_scale * scale, decay / scale)
        groups.setdefault(key, []).append(parameter)

    for plugin, asked in manager.call_each("apt_param_groups", model=model):
        steps = [
            learning_rate * g.get("lr_scale", 1.0) * g.get("weight_decay", weight_decay)
            for g in asked
        ]
        if max(steps, default=0.0) > 1:
            wrong = f"rate times decay is {max(steps):g}: above 1 a step turns the weights around"
            manager.failures.fail(plugin, "apt_param_groups", ValueError(wrong))
            continue
        for group in asked:
            decay, lr_scale = group.get("weight_decay"), group.get("lr_scale", 1.0)
            for parameter in group["params"]:
                if id(parameter) in left:
                    add(*left.pop(id(parameter)), lr_scale, decay)
    for name, parameter in left.values():
        add(name, parameter, 1.0, None)
    return [_group(key, parameters) for key, parameters in groups.items()]


def hidden_matrices(model: nn.Module) -> dict[str, int]:
    """The hidden matrices of a model by name, parameters [..., R, C] with R and C above 1 that map
    a hidden vector to another, with the number of matrices stacked along R in each.

    They are the matrices of the blocks in a backbone's ``nn.ModuleList``; embeddings, positions and
    the output head are outside. The weights of ``nn.Embedding`` are left out, and parameters that a
    module names in ``elementwise`` because their rows or entries are learned separately. A module
    gives in ``stacked`` how many matrices of equal size a parameter packs (the projections of an
    attention's heads); the default is one.
    """
    found = {
        id(parameter) for parameter in block_stack(model)[1].parameters() if parameter.ndim >= 2
    }
    counts: dict[int, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and not hasattr(module, "elementwise"):
            found.discard(id(module.weight))
        for own in declared(path, module, "elementwise"):
            found.discard(id(module.get_parameter(own)))
        for own in declared(path, module, "stacked"):
            counts[id(module.get_parameter(own))] = module.stacked[own]
    matrices = {
        name: (parameter.shape, counts.get(id(parameter), 1))
        for name, parameter in model.named_parameters()
        if id(parameter) in found
    }
    return {
        name: count
        for name, (shape, count) in matrices.items()
        if shape[-2] > count and shape[-1] > 1
    }


def _group(key: _Key, parameters: list[Tensor]) -> dict[str, Any]:
    if key.stacked is None:
        return {"params": parameters, "lr": key.lr, "weight_decay": key.decay}
    decay = {} if key.decay is None else {"weight_decay": key.decay}
    kind = {"hidden_matrices": True, "stacked": key.stacked}
    return {"params": parameters, **kind, "lr_scale": key.lr, **decay}
