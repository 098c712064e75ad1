"""The training loop, its optimizer, its checkpoints and its run folder."""

from apt_core.training.run import RunResult
from apt_core.training.trainer import Trainer

__all__ = ["RunResult", "Trainer"]
