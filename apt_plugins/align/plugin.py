"""Registers ``align:bistate_default`` and adds its terms to the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from apt_core import (
    PluginCosts,
    PluginInfo,
    Priority,
    ProviderSpec,
    SectionSpec,
    hookimpl,
)
from apt_plugins.align.settings import (
    DEFAULT,
    SECTION,
    WEIGHT,
    BistateSettings,
    contradictions,
    inactive,
    settings_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from apt_core.config import Config
    from apt_plugins.align.alignment import Alignment

PLUGIN = PluginInfo(
    summary="pulls the model towards a stable state of itself: a teacher of averaged weights, or "
    "a second pass (R-Drop)",
    version="1.0.0",
)


class Plugin:
    """The alignment of one run."""

    def __init__(self) -> None:
        self._alignment: Alignment | None = None

    @hookimpl
    def apt_register_providers(self) -> list[ProviderSpec]:
        return [
            ProviderSpec(
                kind="align",
                name=DEFAULT,
                factory="apt_plugins.align.objective:BistateProvider",
                version="1.0.0",
                summary="divergence of predictions and contrast of states, between two states",
                section=SECTION,
                config="apt_plugins.align.settings:BistateSettings",
            )
        ]

    @hookimpl
    def apt_register_config(self) -> list[SectionSpec]:
        return [
            SectionSpec(
                SECTION,
                BistateSettings,
                schedule_params=(WEIGHT,),
                inactive=inactive,
                check=contradictions,
                names={"align": "align"},
            )
        ]

    @hookimpl
    def apt_costs(self, config: Config) -> PluginCosts:
        if settings_of(config).mode == "rdrop":
            return PluginCosts(passes=1)
        return PluginCosts(averages=1, forwards=1)

    @hookimpl(collective=True)
    def on_step_start(self, step: int, trainer: Any) -> None:
        if self._alignment is None:
            from apt_plugins.align.alignment import Alignment

            self._alignment = Alignment(trainer)
        self._alignment.begin_step(step, trainer)

    # Late: a second pass replaces what the first one left in the layers, which other plugins read.
    @hookimpl(priority=Priority.LATE)
    def apt_loss_terms(self, trainer: Any, batch: Any, output: Any) -> Mapping[str, Tensor]:
        assert self._alignment is not None
        return self._alignment.terms(trainer, batch, output)

    @hookimpl
    def apt_metrics(self) -> Mapping[str, float]:
        alignment = self._alignment
        assert alignment is not None
        metrics = {"weight": alignment.weight}
        if alignment.has_teacher:
            metrics["momentum"] = alignment.momentum
        return metrics
