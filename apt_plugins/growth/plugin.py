"""Growth: makes the model wider, deeper, or gives it more ids, at any step of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apt_core import PluginInfo, SectionSpec, hookimpl
from apt_plugins.growth.settings import GrowthSettings, contradictions

if TYPE_CHECKING:
    from apt_core.config import Config
    from apt_core.modeling import ModelTransform

PLUGIN = PluginInfo(
    summary="a trained model grows in width, depth or vocabulary without a change of outputs",
    version="1.0.0",
)


@hookimpl
def apt_register_config() -> list[SectionSpec]:
    return [
        SectionSpec(
            "growth",
            GrowthSettings,
            check=contradictions,
            grows={"vocab_size": "model.vocab_size"},
            without="the model keeps its size",
        )
    ]


@hookimpl
def apt_transform_model(model: Any, config: Config) -> ModelTransform:
    from apt_plugins.growth.growing import grown

    return grown(model, config)
