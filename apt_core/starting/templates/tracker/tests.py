"""What the plugin promises, in runs of a second."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from apt_core import hookimpl
from apt_core.testing import check_plugin, tiny_run


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_keeps_what_every_plugin_promises() -> None:
    assert [finding for finding in check_plugin("my_plugin") if not finding.ok] == []


def test_the_file_has_the_figures_of_the_run(tmp_path: Path) -> None:
    run = tiny_run("my_plugin", overrides={"my_plugin.path": "figures.csv"})
    rows = list(csv.DictReader((tmp_path / "figures.csv").open(encoding="utf-8")))
    losses = [float(row["value"]) for row in rows if row["name"] == "loss"]
    assert losses == [row["loss"] for row in run.metrics if "loss" in row]


class StopAt:
    """Stops a run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @hookimpl
    def on_step_end(self, step: int, trainer: Any) -> None:
        if step == self.step:
            trainer.request_stop("half of it is done")


def test_the_file_of_a_resumed_run_has_all_of_it(tmp_path: Path) -> None:
    tiny_run("my_plugin", steps=16, overrides={"my_plugin.path": "whole.csv"})
    half = {"my_plugin.path": "half.csv"}
    tiny_run("my_plugin", StopAt(8), steps=16, overrides=half, output=tmp_path / "run")
    tiny_run("my_plugin", steps=16, overrides=half, output=tmp_path / "run", resume=True)
    whole, resumed = (
        [row for row in csv.reader((tmp_path / name).open(encoding="utf-8")) if row[1] == "loss"]
        for name in ("whole.csv", "half.csv")
    )
    assert whole == resumed
