"""Declares the stages that the profile names."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from apt_core import PluginInfo, SectionSpec, TrainableStage, hookimpl
from apt_plugins.trainable.settings import (
    SECTION,
    TrainableSettings,
    contradictions,
    settings_of,
    stages_of,
)

if TYPE_CHECKING:
    from apt_core.config import Config

PLUGIN = PluginInfo(
    summary="which parameters are trained, by stages: some are frozen at first, others later",
    version="1.0.0",
)

log = logging.getLogger("apt.trainable")


@hookimpl
def apt_register_config() -> list[SectionSpec]:
    return [
        SectionSpec(
            SECTION,
            TrainableSettings,
            check=contradictions,
            without="all parameters are trained",
        )
    ]


@hookimpl
def apt_configure(config: Config) -> None:
    if not settings_of(config).stages:
        log.warning(
            "trainable freezes nothing: trainable.stages is empty (name stages, or leave it out)"
        )


@hookimpl
def apt_trainable(config: Config) -> list[TrainableStage]:
    return [*stages_of(config)]
