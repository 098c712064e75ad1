"""The training loop, its optimizer, its checkpoints and its run folder."""

from apt_core.training.trainer import RunResult, Trainer

__all__ = ["RunResult", "Trainer"]
