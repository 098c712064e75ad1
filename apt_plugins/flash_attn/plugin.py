"""Registers ``attention:flash_v2`` and ``attention:flex``."""

from __future__ import annotations

from apt_core import PluginInfo, ProviderSpec, SectionSpec, hookimpl
from apt_plugins.flash_attn.settings import (
    NAME,
    SECTION,
    FlexSettings,
    contradictions,
    inactive,
)

PLUGIN = PluginInfo(
    summary="TVA by flash-attention, and attention in a window by FlexAttention",
    version="2.1.0",
)


@hookimpl
def apt_register_providers() -> list[ProviderSpec]:
    return [
        ProviderSpec(
            kind="attention",
            name="flash_v2",
            factory="apt_plugins.flash_attn.layer:FlashTVAProvider",
            version="2.0.0",
            summary="fused TVA on the flash-attention kernel; same weights as tva_default",
            requires=("flash-attn>=2.4",),
            section="model.tva",
            config="apt_core.providers.attention:TVASettings",
        ),
        ProviderSpec(
            kind="attention",
            name=NAME,
            factory="apt_plugins.flash_attn.flex:FlexProvider",
            version="1.0.0",
            summary="multi-head attention in a sliding window; same weights as mha",
            section=SECTION,
            config=FlexSettings,
        ),
    ]


@hookimpl
def apt_register_config() -> list[SectionSpec]:
    return [SectionSpec(SECTION, FlexSettings, inactive=inactive, check=contradictions)]
