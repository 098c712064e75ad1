"""What a guarded hook call costs, against stock pluggy and against a plain call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluggy

from _harness import Report, interleave, run
from apt_core import hookimpl, hookspecs
from apt_core.markers import PROJECT
from apt_core.plugin_manager import PluginManager

STEP, LOSS, TRAINER = 7, 0.5, object()


class Observer:
    """An implementation that does nothing, so that only the call is timed."""

    @hookimpl
    def on_step_end(self, step: int, loss: Any) -> None:
        pass


def caller(manager: pluggy.PluginManager, implementations: int) -> Callable[[], object]:
    """A call of ``on_step_end`` with this number of plugins registered."""
    for number in range(implementations):
        manager.register(Observer(), f"plugin_{number}")
    hook = manager.hook.on_step_end
    return lambda: hook(step=STEP, loss=LOSS, trainer=TRAINER)


def stock() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def plain() -> Callable[[], object]:
    """The same work without any plugin system."""
    function = Observer().on_step_end
    return lambda: function(step=STEP, loss=LOSS)


def measure(report: Report, quick: bool) -> None:
    rounds = 20 if quick else 300
    for implementations in (0, 1, 5):
        times = interleave(
            {
                "guarded": caller(PluginManager(), implementations),
                "stock": caller(stock(), implementations),
                "plain": plain(),
            },
            baseline="stock",
            rounds=rounds,
        )
        name = f"guarded_over_stock_{implementations}"
        report.ratio(name, times, "guarded", over="stock")
        report.noise(f"stock_over_stock_{implementations}", times)
        report.add(f"guarded_{implementations}_ns", round(times.median("guarded"), 1))
        if implementations == 1:
            report.ratio("guarded_over_plain_1", times, "guarded", over="plain")


if __name__ == "__main__":
    run("What does a guarded hook call cost?", measure, packages=["pluggy"])
