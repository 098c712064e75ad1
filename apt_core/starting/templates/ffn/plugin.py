"""Registers a feed-forward of two products with SiLU between them."""

from __future__ import annotations

from pydantic import Field

from apt_core import PluginInfo, ProviderSpec, SectionSpec, hookimpl
from apt_core.config import Section

PLUGIN = PluginInfo(summary="two products with SiLU between", version="0.1.0")


class Settings(Section):
    """The section ``my_plugin`` of the profile."""

    sharpness: float = Field(default=1.0, gt=0, le=100, description="β of x · sigmoid(βx).")


@hookimpl
def apt_register_config() -> list[SectionSpec]:
    return [SectionSpec("my_plugin", Settings)]


@hookimpl
def apt_register_providers() -> list[ProviderSpec]:
    return [
        ProviderSpec(
            kind="ffn",
            name="my_plugin",
            factory="apt_my_plugin.layer:Provider",  # imported when it is used: torch is slow
            version=PLUGIN.version,
            summary=PLUGIN.summary,
            config=Settings,
            section="my_plugin",
        )
    ]
