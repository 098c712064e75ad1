"""``optimizer:adamw``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from apt_core.providers.optimizer import ADAM_BETAS, ADAM_EPS, OptimizerProvider

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
            betas=tuple(self.setting("betas", ADAM_BETAS)),
            eps=self.setting("eps", ADAM_EPS),
            weight_decay=weight_decay,
            fused=True,
        )
