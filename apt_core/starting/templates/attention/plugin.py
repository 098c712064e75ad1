"""Registers an attention in which every head learns a temperature of its own."""

from __future__ import annotations

from pydantic import Field

from apt_core import PluginInfo, ProviderSpec, SectionSpec, hookimpl
from apt_core.config import Section

PLUGIN = PluginInfo(summary="attention with a temperature for each head", version="0.1.0")


class Settings(Section):
    """The section ``my_plugin`` of the profile."""

    initial: float = Field(default=1.0, gt=0, le=100, description="The temperatures at the start.")


@hookimpl
def apt_register_config() -> list[SectionSpec]:
    return [SectionSpec("my_plugin", Settings)]


@hookimpl
def apt_register_providers() -> list[ProviderSpec]:
    return [
        ProviderSpec(
            kind="attention",
            name="my_plugin",
            factory="apt_my_plugin.layer:Provider",  # imported when it is used: torch is slow
            version=PLUGIN.version,
            summary=PLUGIN.summary,
            config=Settings,
            section="my_plugin",
        )
    ]
