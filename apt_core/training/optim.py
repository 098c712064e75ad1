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
    model: nn.Module, manager: PluginManager, *, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The optimizer's groups: those that plugins ask for, then matrices and the rest.

    Weight decay is for matrices only: a decayed gain or bias pulls towards zero what has no reason
    to be there. A plugin's group may set ``lr_scale`` and ``weight_decay``.
    """
    left = {id(p): p for p in model.parameters() if p.requires_grad}
    groups: list[dict[str, Any]] = []
    for plugin, asked in manager.call_each("apt_param_groups", model=model):
        try:
            planned = [_plugin_group(group, left, learning_rate, weight_decay) for group in asked]
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            manager.fail(plugin, "apt_param_groups", error)
            continue
        for group in planned:
            group["params"] = [p for p in group["params"] if left.pop(id(p), None) is not None]
        groups += [group for group in planned if group["params"]]
    matrices = [p for p in left.values() if p.ndim >= 2]
    vectors = [p for p in left.values() if p.ndim < 2]
    groups.append({"params": matrices, "lr": learning_rate, "weight_decay": weight_decay})
    groups.append({"params": vectors, "lr": learning_rate, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _plugin_group(
    group: Mapping[str, Any], left: Mapping[int, Tensor], learning_rate: float, weight_decay: float
) -> dict[str, Any]:
    unknown = set(group) - {"params", "lr_scale", "weight_decay"}
    if unknown:
        raise ValueError(f"a parameter group has the unknown keys {sorted(unknown)}")
    return {
        "params": [p for p in group["params"] if id(p) in left],
        "lr": learning_rate * float(group.get("lr_scale", 1.0)),
        "weight_decay": float(group.get("weight_decay", weight_decay)),
    }


class FiniteGuard:
    """Makes a step whose gradients are not finite change nothing, and counts such steps.

    Where the optimizer takes ``found_inf`` (torch's fused ones) the decision stays on the device;
    elsewhere it is read on the host, once a step.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._on_device = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._in_a_row = torch.zeros((), device=device)
        self._total = torch.zeros((), device=device)

    def step(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Take the optimizer's step unless ``loss`` or ``grad_norm`` is not finite.

        Returns 1.0 for a step that was skipped, else 0.0, on the device.
        """
        skipped = 1.0 - torch.isfinite(loss + grad_norm).float()
        self._total += skipped
        self._in_a_row = (self._in_a_row + 1.0) * skipped
        if self._on_device:
            self._optimizer.grad_scale = None  # type: ignore[attr-defined]
            self._optimizer.found_inf = skipped  # type: ignore[attr-defined]
            self._optimizer.step()
        elif not skipped.item():
            self._optimizer.step()
        return skipped

    def read(self) -> tuple[int, int]:
        """Skipped steps in all and in a row; waits for the device."""
        return int(self._total.item()), int(self._in_a_row.item())

    def load(self, total: int, in_a_row: int) -> None:
        self._total.fill_(total)
        self._in_a_row.fill_(in_a_row)
