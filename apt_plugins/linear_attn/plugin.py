"""Registers ``attention:linear_causal``."""

from __future__ import annotations

from apt_core import PluginInfo, ProviderSpec, SectionSpec, hookimpl
from apt_plugins.linear_attn.settings import (
    ATTENTION,
    SECTION,
    LinearAttentionSettings,
    contradictions,
    inactive,
)

PLUGIN = PluginInfo(
    summary="linear attention: the gated delta rule, whose state has a constant size",
    version="1.0.0",
)


@hookimpl
def apt_register_providers() -> list[ProviderSpec]:
    return [
        ProviderSpec(
            kind="attention",
            name=ATTENTION,
            factory="apt_plugins.linear_attn.layer:LinearAttentionProvider",
            version="1.0.0",
            summary="the gated delta rule in chunks: time linear in the text, a constant state",
            section=SECTION,
            config=LinearAttentionSettings,
        )
    ]


@hookimpl
def apt_register_config() -> list[SectionSpec]:
    return [
        SectionSpec(
            SECTION,
            LinearAttentionSettings,
            inactive=inactive,
            check=contradictions,
        )
    ]
