"""What the plugin promises, in runs of a second."""

from __future__ import annotations

from apt_core.testing import check_plugin, tiny_run

TERM = "loss/my_plugin.negative_entropy"


def test_it_keeps_what_every_plugin_promises() -> None:
    assert [finding for finding in check_plugin("my_plugin") if not finding.ok] == []


def test_its_weight_is_heeded() -> None:
    without = tiny_run(steps=8)
    assert tiny_run("my_plugin", steps=8, overrides={"my_plugin.weight": 0.0}).same_weights(without)
    assert not tiny_run("my_plugin", steps=8).same_weights(without)


def test_a_schedule_enables_it_and_moves_its_weight() -> None:
    schedules = {
        "enable_my_plugin_at_epoch": 2,
        "my_plugin_weight": {"start": 0.0, "end": 1.0, "by": "epoch"},
    }
    run = tiny_run("my_plugin", overrides={"schedules": schedules})
    assert {row["epoch"] for row in run.metrics if TERM in row} == {2}
