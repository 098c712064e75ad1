"""Multi-head attention to TVA of a rank, at any step of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apt_core import PluginInfo, SectionSpec, hookimpl
from apt_plugins.to_tva.settings import ToTVASettings, contradictions

if TYPE_CHECKING:
    from apt_core.config import Config
    from apt_core.modeling import ModelTransform

PLUGIN = PluginInfo(
    summary="multi-head attention becomes TVA of a rank, exactly or within a tolerance",
    version="1.0.0",
)


@hookimpl
def apt_register_config() -> list[SectionSpec]:
    return [
        SectionSpec(
            "to_tva", ToTVASettings, check=contradictions, without="the attention stays as it is"
        )
    ]


@hookimpl
def apt_transform_model(model: Any, config: Config, registry: Any) -> ModelTransform:
    from apt_plugins.to_tva.attention import with_tva

    return with_tva(model, config, registry)
