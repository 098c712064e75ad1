"""Registers ``attention:flash_v2``."""

from __future__ import annotations

from apt_core import PluginInfo, ProviderSpec, hookimpl

PLUGIN = PluginInfo(summary="fused TVA on the flash-attention kernel", version="2.0.0")


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
        )
    ]
