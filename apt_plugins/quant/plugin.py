"""Weights of 8 and 4 bits: kept so by ``apt-quantize``, and rounded so in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apt_core import ConfigError, PluginInfo, SectionSpec, hookimpl
from apt_plugins.quant.settings import SECTION, QuantSettings, inactive, settings_of

if TYPE_CHECKING:
    from apt_core.config import Config
    from apt_core.modeling import ModelTransform

NAME = "quant"

PLUGIN = PluginInfo(
    summary="weights of 8 and 4 bits: apt-quantize, and training that takes rounding into account",
    version="1.0.0",
)


@hookimpl
def apt_register_config() -> list[SectionSpec]:
    return [
        SectionSpec(
            SECTION, QuantSettings, inactive=inactive, without="the model's weights are not rounded"
        )
    ]


@hookimpl
def apt_transform_model(model: Any, config: Config, trains: bool) -> ModelTransform:
    settings = settings_of(config)
    if settings.packed and trains:
        raise ConfigError(
            "the weights are integers, which cannot be trained",
            f"{SECTION}.packed",
            hint="train the run that was quantised, and apt-quantize it again; model.quant without "
            "packed trains with rounded weights",
        )
    from apt_plugins.quant.transform import transform_of

    return transform_of(model, settings)
