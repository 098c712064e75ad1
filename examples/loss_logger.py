"""An observer: writes the training loss to a CSV file with each checkpoint; a resume continues it.

apt-train -p tiny_debug --plugin examples/loss_logger.py --loss_logger.path my_loss.csv
"""

from __future__ import annotations

import csv
from pathlib import Path

from pydantic import Field

from apt_core import PluginInfo, SectionSpec, hookimpl
from apt_core.config import Section

PLUGIN = PluginInfo(summary="writes the training loss to a CSV file", version="1.0.0")


class Settings(Section):
    path: str = Field(default="loss.csv", description="The file to write.")


class Plugin:
    def __init__(self):
        self.rows = []

    @hookimpl
    def apt_register_config(self):
        return [SectionSpec("loss_logger", Settings)]

    @hookimpl
    def on_metrics(self, metrics, step):
        if "loss" in metrics:
            self.rows.append([step, metrics["loss"]])

    @hookimpl
    def on_checkpoint_saved(self, trainer):
        path = Path(trainer.config.section("loss_logger").path)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["step", "loss"], *self.rows])

    @hookimpl
    def apt_state_dict(self):
        return {"rows": self.rows}

    @hookimpl
    def apt_load_state_dict(self, state):
        self.rows = state["rows"]
