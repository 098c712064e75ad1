"""Promise 4 for a curriculum of which a plugin has failed: what it left in the model stays."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

import apt_plugins.moe.statistics as statistics
import apt_plugins.routing.plugin as routing
from apt_core.training import restoring

if TYPE_CHECKING:
    from tests.training.curriculum.conftest import Curriculum

STEPS = 10
"""After the switch, and after the failures below."""


def failing(function: Callable[..., Any], after: int) -> Callable[..., Any]:
    calls = 0

    def call(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError("no more")
        return function(*arguments)

    return call


BREAKS = {
    # Within the steps without a limit, so that the limit would come back with a resume.
    "moe": (statistics, "losses", 2, {"model.moe.dropless_steps": 2, "model.moe.capacity": 1.0}),
    # Once it has set them: hooks for events are quarantined at the third failure.
    "routing": (routing.Plugin, "set_controls", 7, {"schedules.moe_capacity": None}),
}


@pytest.mark.parametrize("plugin", BREAKS)
def test_a_run_whose_plugin_was_quarantined_resumes_exactly(
    make_curriculum: Callable[..., Curriculum], monkeypatch, plugin: str
) -> None:
    """Unless its buffers are not read."""
    module, name, after, settings = BREAKS[plugin]
    curriculum = make_curriculum(settings)
    working = getattr(module, name)
    monkeypatch.setattr(module, name, failing(working, after))
    whole = curriculum.train("whole", strict=False)
    (row,) = (r for r in whole.manifest["plugins"] if r["name"] == plugin)
    assert row["state"] == "quarantined"
    monkeypatch.setattr(module, name, failing(working, after))
    curriculum.train("cut", strict=False, stop_at_step=STEPS)
    shutil.copytree(curriculum.folder / "cut", curriculum.folder / "unread")
    for name in ("cut", "unread"):
        resumed = curriculum.train(name, strict=False, resume=True)
        assert resumed.same_weights(whole) is (name == "cut")
        monkeypatch.setattr(restoring, "call_buffers_loaded", lambda model: None)
