"""``optimizer:adamw``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from apt_core.providers.optimizer import OptimizerProvider

ADAM_STATE = frozenset({"step", "exp_avg", "exp_avg_sq"})


class AdamWProvider(OptimizerProvider):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), torch's fused kernel."""

    name = "adamw"
    states = (ADAM_STATE,)

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
