"""Writes the metrics of a run to a CSV file, a row for each figure."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from apt_core import PluginInfo, SectionSpec, hookimpl
from apt_core.config import Section

PLUGIN = PluginInfo(summary="writes metrics to a CSV file", version="0.1.0", observer=True)


class Settings(Section):
    """The section ``my_plugin`` of the profile."""

    path: str = Field(default="my_plugin.csv", description="The file to write.")


class Plugin:
    """Each run makes an object of its own, so that ``self`` is the run's."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, float]] = []

    @hookimpl
    def apt_register_config(self) -> list[SectionSpec]:
        return [SectionSpec("my_plugin", Settings)]

    @hookimpl
    def on_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.rows += [
            (step, name, value) for name, value in metrics.items() if isinstance(value, float)
        ]

    @hookimpl
    def on_checkpoint_saved(self, trainer: Any) -> None:
        path = Path(trainer.config.section("my_plugin").path)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("step", "name", "value"), *self.rows])

    @hookimpl
    def apt_state_dict(self) -> dict[str, Any]:
        return {"rows": [list(row) for row in self.rows]}

    @hookimpl
    def apt_load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows = [(step, name, value) for step, name, value in state["rows"]]
