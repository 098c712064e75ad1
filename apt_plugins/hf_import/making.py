"""Makes the run, which stops before its first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from apt_core.errors import Interrupted
from apt_core.kernel import Kernel
from apt_core.training import Trainer
from apt_core.training.run import RunResult

STOP = "the model was imported"


@dataclass(frozen=True)
class Made:
    trainer: Trainer
    result: RunResult

    @property
    def parameters(self) -> int:
        return self.trainer.trained.num_parameters

    @property
    def loss(self) -> float:
        return self.result.figures.get("val_loss", float("nan"))


def made_run(kernel: Kernel, folder: Path, weights: Callable[[nn.Module], None]) -> Made:
    """A run in ``folder`` that stops before its first step."""
    trainer = Trainer(kernel, output=folder, weights=weights)
    trainer.request_stop(STOP)
    result = trainer.fit()
    if result.exit_code:
        raise Interrupted(result.exit_code - 128)
    return Made(trainer, result)
