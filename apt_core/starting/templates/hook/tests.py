"""What the plugin promises, in runs of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apt_core import hookimpl
from apt_core.testing import TinyRun, check_plugin, tiny_run


def test_it_keeps_what_every_plugin_promises() -> None:
    assert [finding for finding in check_plugin("my_plugin") if not finding.ok] == []


def counted(run: TinyRun) -> float:
    """The last figure in the metrics."""
    return [row["my_plugin/better"] for row in run.metrics if "my_plugin/better" in row][-1]


def test_it_counts_and_its_settings_are_heeded() -> None:
    run = tiny_run("my_plugin")
    strict = tiny_run("my_plugin", overrides={"my_plugin.min_delta": 100.0})
    assert counted(run) > 0 and counted(strict) == 0
    assert run.same_weights(strict)


class StopAt:
    """Stops a run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @hookimpl
    def on_step_end(self, step: int, trainer: Any) -> None:
        if step == self.step:
            trainer.request_stop("half of it is done")


def test_its_state_survives_a_resume(tmp_path: Path) -> None:
    whole = tiny_run("my_plugin", steps=16)
    tiny_run("my_plugin", StopAt(8), steps=16, output=tmp_path / "run")
    resumed = tiny_run("my_plugin", steps=16, output=tmp_path / "run", resume=True)
    one, other = (vars(run.manager.get_plugin("my_plugin")) for run in (whole, resumed))
    assert one == other and one["best"] is not None
