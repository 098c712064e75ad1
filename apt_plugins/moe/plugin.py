"""Mixture of experts: turns every dense feed-forward into experts, at any step of a run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from apt_core import PluginInfo, Priority, ProviderSpec, SectionSpec, hookimpl
from apt_plugins.moe.settings import ROUTERS, MoeSettings, contradictions, inactive, settings_of

if TYPE_CHECKING:
    from collections.abc import Generator

    from apt_core.config import Config
    from apt_core.modeling import ModelTransform
    from apt_plugins.moe.layer import MoELayer

NAME = "moe"

PLUGIN = PluginInfo(
    summary="mixture of experts, grown from the dense feed-forwards without a change of outputs",
    version="1.0.0",
)

log = logging.getLogger("apt.moe")


class Plugin:
    """The plugin's state in one run."""

    def __init__(self) -> None:
        self._layers: WeakKeyDictionary[Any, list[MoELayer]] = WeakKeyDictionary()
        """The layers by model: searching a model takes longer than counting its loads."""

    @hookimpl
    def apt_register_providers(self) -> list[ProviderSpec]:
        return [
            ProviderSpec(
                kind="router",
                name=name,
                factory="apt_plugins.moe.router:TopKProvider",
                version="1.0.0",
                summary=summary,
                config=MoeSettings,
            )
            for name, summary in (
                (ROUTERS[0], "the top k experts of a linear score, their weights renormalised"),
                (ROUTERS[1], f"another name of {ROUTERS[0]}"),
            )
        ]

    @hookimpl
    def apt_register_config(self) -> list[SectionSpec]:
        return [
            SectionSpec(
                "model.moe",
                MoeSettings,
                inactive=inactive,
                check=contradictions,
                names={"router": "router"},
                without="the dense feed-forward stays",
            )
        ]

    @hookimpl
    def apt_transform_model(
        self, model: Any, config: Config, registry: Any
    ) -> ModelTransform | None:
        settings = settings_of(config)
        if not settings.enabled:
            log.info("model.moe.enabled is false: the dense feed-forward stays")
            return None
        from apt_plugins.moe.upcycle import upcycled

        return upcycled(model, config, settings, registry)

    def moe_layers_of(self, trainer: Any) -> list[MoELayer]:
        """The MoE layers of the trainer's present model; may be empty."""
        model = trainer.model
        if model not in self._layers:
            from apt_plugins.moe.layer import moe_layers

            self._layers[model] = moe_layers(model)
        return self._layers[model]

    @hookimpl(priority=Priority.EARLY, collective=True)
    def on_step_start(self, step: int, trainer: Any) -> None:
        layers = self.moe_layers_of(trainer)
        if not layers:
            return
        from apt_plugins.moe.statistics import start_counting

        start_counting(layers)
        first = trainer.schedule.first_step_of(NAME) + settings_of(trainer.config).dropless_steps
        for layer in layers:
            layer.limited = step >= first

    # A wrapper that reads the layers before all others: a plugin that calls the model replaces the
    # values that its layers keep of the batch's forward.
    @hookimpl(priority=Priority.FIRST, wrapper=True)
    def apt_loss_terms(self, trainer: Any, batch: Any) -> Generator[None, list[Any], list[Any]]:
        # A layer that a plugin keeps in eval mode records nothing.
        layers = [
            layer
            for layer in self.moe_layers_of(trainer)
            if layer.training and layer.router.training
        ]
        own = []
        if layers:
            from apt_plugins.moe.statistics import losses

            own = [losses(layers, batch, settings_of(trainer.config))]
        return own + (yield)

    # Early: plugins that balance the load at the end of the step need that of all processes.
    @hookimpl(priority=Priority.EARLY, collective=True)
    def on_step_end(self, step: int, trainer: Any) -> None:
        layers = self.moe_layers_of(trainer)
        if layers and trainer.world_size > 1:
            from apt_plugins.moe.statistics import sum_over_processes

            sum_over_processes(layers)
        for layer in layers:
            layer.counted_step = step

    @hookimpl
    def apt_metrics(self, trainer: Any) -> dict[str, float]:
        layers = self.moe_layers_of(trainer)
        if not layers:
            return {}
        from apt_plugins.moe.statistics import figures

        return figures(layers)
