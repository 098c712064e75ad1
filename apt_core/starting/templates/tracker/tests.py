"""What the plugin promises, in runs of a second."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from apt_core import hookimpl
from apt_core.testing import check_plugin, tiny_run


def test_it_keeps_what_every_plugin_promises() -> None:
    assert [finding for finding in check_plugin("my_plugin") if not finding.ok] == []


def losses(run: Path, name: str = "my_plugin.csv") -> list[tuple[int, float]]:
    """The steps and losses that the file has."""
    with (run / name).open(newline="", encoding="utf-8") as file:
        return [(int(step), float(value)) for step, key, value in csv.reader(file) if key == "loss"]


def test_the_file_has_the_figures_of_the_run(tmp_path: Path) -> None:
    run = tiny_run("my_plugin", overrides={"my_plugin.file": "own.csv"}, output=tmp_path / "run")
    expected = [(row["step"], row["loss"]) for row in run.metrics if "loss" in row]
    assert losses(tmp_path / "run", "own.csv") == expected != []


class StopAt:
    """Stops a run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @hookimpl
    def on_step_end(self, step: int, trainer: Any) -> None:
        if step == self.step:
            trainer.request_stop("half of it is done")


def test_the_file_of_a_resumed_run_has_all_of_it_once(tmp_path: Path) -> None:
    tiny_run("my_plugin", steps=16, output=tmp_path / "whole")
    tiny_run("my_plugin", StopAt(8), steps=16, output=tmp_path / "half")
    tiny_run("my_plugin", steps=16, output=tmp_path / "half", resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "half")
