"""Writes the metrics of a run to a CSV file in its folder, a row for each figure.

Its hooks run in the background, beside the loop: however slow they are, and if they fail, the run
loses no step.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from apt_core import PluginInfo, SectionSpec, hookimpl
from apt_core.config import Section
from apt_core.types import RunFacts

PLUGIN = PluginInfo(summary="writes metrics to a CSV file", version="0.1.0", observer=True)


class Settings(Section):
    """The section ``my_plugin`` of the profile."""

    file: str = Field(
        default="my_plugin.csv",
        pattern=r"^[\w.-]+$",
        description="The file's name in the folder of the run.",
    )


class Plugin:
    """Each run makes an object of its own, so that ``self`` is the run's."""

    def __init__(self) -> None:
        self.path: Path | None = None

    @hookimpl
    def apt_register_config(self) -> list[SectionSpec]:
        return [SectionSpec("my_plugin", Settings)]

    @hookimpl(background=True)
    def on_resume(self, step: int, run: RunFacts) -> None:
        """Take back the rows of steps that are taken again."""
        path = _path(run)
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                kept = [row for row in csv.reader(file) if int(row[0]) <= step]
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(kept)

    @hookimpl(background=True)
    def on_training_start(self, run: RunFacts) -> None:
        self.path = _path(run)

    @hookimpl(background=True)
    def on_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        assert self.path is not None
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                (step, name, value) for name, value in metrics.items() if isinstance(value, float)
            )


def _path(run: RunFacts) -> Path:
    return run.folder / str(run.settings["my_plugin"]["file"])
