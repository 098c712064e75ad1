"""Sets temperature, exploration and capacity of a mixture of experts, and balances its load."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from apt_core import PluginInfo, SectionSpec, hookimpl
from apt_plugins.routing.settings import (
    SCHEDULE_PARAMS,
    RoutingSettings,
    contradictions,
    has_experts,
    inactive,
    settings_of,
)

if TYPE_CHECKING:
    from apt_plugins.routing.controls import RoutingControls

PLUGIN = PluginInfo(
    summary="how a mixture of experts routes: temperature, exploration, capacity, balance",
    version="1.0.0",
)

log = logging.getLogger("apt.routing")


class Plugin:
    """The routing of one run."""

    def __init__(self) -> None:
        self._controls: WeakKeyDictionary[Any, RoutingControls] = WeakKeyDictionary()
        """By model: a switch replaces the model in mid-run, and its layers have no values yet."""

    @hookimpl
    def apt_register_config(self) -> list[SectionSpec]:
        return [
            SectionSpec(
                "routing",
                RoutingSettings,
                schedule_params=SCHEDULE_PARAMS,
                inactive=inactive,
                check=contradictions,
            )
        ]

    def controls_of(self, model: Any) -> RoutingControls:
        if model not in self._controls:
            from apt_plugins.moe.layer import moe_layers
            from apt_plugins.routing.controls import RoutingControls

            self._controls[model] = RoutingControls(moe_layers(model))
        return self._controls[model]

    def set_controls(self, trainer: Any) -> None:
        """Set the scheduled values of the current step. Evaluations use them too."""
        self.controls_of(trainer.model).set(
            {
                "temperature": trainer.param("route_temp"),
                "exploration": settings_of(trainer.config).exploration,
                "capacity": trainer.param("moe_capacity"),
            }
        )

    @hookimpl
    def on_training_start(self, trainer: Any) -> None:
        if trainer.step == 0:  # a resume has restored the values, which a due evaluation uses
            self.set_controls(trainer)
        if not has_experts(trainer.config):
            log.warning(
                "routing does nothing: the run has no mixture of experts (add moe to plugins, or "
                "leave routing out)"
            )

    @hookimpl(collective=True)
    def on_step_start(self, trainer: Any) -> None:
        self.set_controls(trainer)

    @hookimpl(collective=True)
    def on_step_end(self, step: int, trainer: Any) -> None:
        settings, layers = settings_of(trainer.config), self.controls_of(trainer.model).layers
        # Layers that no longer count keep the loads of an earlier step.
        if settings.balancing == "none" or not layers or layers[0].counted_step != step:
            return
        from apt_plugins.routing.balancing import move_biases

        move_biases(layers, settings.bias_rate, trainer.step_void)
