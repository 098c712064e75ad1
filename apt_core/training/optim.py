"""The core's optimizer and learning-rate schedule, and how parameters are grouped."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apt_core.plugin_manager import PluginManager
from apt_core.providers.lr_schedule import LRScheduleProvider
from apt_core.providers.optimizer import OptimizerProvider

log = logging.getLogger("apt.training")


class AdamWProvider(OptimizerProvider):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), torch's fused kernel."""

    name = "adamw"

    def create(
        self, param_groups: Sequence[dict[str, Any]], *, learning_rate: float, weight_decay: float
    ) -> Optimizer:
        return torch.optim.AdamW(
            list(param_groups),
            lr=learning_rate,
            betas=tuple(self.setting("betas", (0.9, 0.95))),
            eps=self.setting("eps", 1e-8),
            weight_decay=weight_decay,
            fused=True,
        )


class CosineProvider(LRScheduleProvider):
    """A linear rise over the warm-up, then half a cosine down to ``min_ratio``."""

    name = "cosine"

    def factor(
        self, step: int, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0
    ) -> float:
        if step <= warmup_steps:
            return step / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


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


class FiniteGuard:
    """Makes a step whose gradients are not finite change nothing, and counts such steps.

    Where the optimizer takes ``found_inf`` (torch's fused ones) the decision stays on the device;
    elsewhere it is read on the host, once a step.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        # On a CPU there is nothing to wait for, and reading costs less than passing it on.
        fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._on_device = fused and device.type != "cpu"
        self._in_a_row = torch.zeros((), device=device)
        self._total = torch.zeros((), device=device)

    def step(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Take the optimizer's step unless ``loss`` or ``grad_norm`` is not finite."""
        skipped = 1.0 - torch.isfinite(loss + grad_norm).float()
        self._total += skipped
        self._in_a_row = (self._in_a_row + 1.0) * skipped
        if self._on_device:
            self._optimizer.grad_scale = None
            self._optimizer.found_inf = skipped
            self._optimizer.step()
        elif not skipped.item():
            self._optimizer.step()

    def read(self) -> tuple[int, int]:
        """Skipped steps in all and in a row; waits for the device."""
        return int(self._total.item()), int(self._in_a_row.item())

    def load(self, total: int, in_a_row: int) -> None:
        self._total.fill_(total)
        self._in_a_row.fill_(in_a_row)
