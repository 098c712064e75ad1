"""Counts the evaluations at which the loss was better than before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from apt_core import PluginInfo, SectionSpec, hookimpl
from apt_core.config import Section

PLUGIN = PluginInfo(summary="counts evaluations with a better loss", version="0.1.0", observer=True)


class Settings(Section):
    """The section ``my_plugin`` of the profile."""

    min_delta: float = Field(
        default=0.0, ge=0, description="By how many nats per token a loss must be better to count."
    )


class Plugin:
    """Each run makes an object of its own, so that ``self`` is the run's."""

    def __init__(self) -> None:
        self.best: float | None = None
        self.better = 0

    @hookimpl
    def apt_register_config(self) -> list[SectionSpec]:
        return [SectionSpec("my_plugin", Settings)]

    @hookimpl
    def on_evaluation_end(self, metrics: Mapping[str, float], trainer: Any) -> None:
        settings, loss = trainer.config.section("my_plugin"), metrics["val_loss"]
        if self.best is None or loss < self.best - settings.min_delta:
            self.better += self.best is not None
            self.best = loss

    @hookimpl
    def apt_metrics(self) -> dict[str, float]:
        return {"better": float(self.better)}

    @hookimpl
    def apt_state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "better": self.better}

    @hookimpl
    def apt_load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.better = state["best"], state["better"]
