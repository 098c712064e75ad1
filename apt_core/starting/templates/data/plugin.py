"""Registers a dataset: the texts in a column of a CSV file."""

from __future__ import annotations

from pydantic import Field

from apt_core import PluginInfo, ProviderSpec, SectionSpec, hookimpl
from apt_core.config import Section

PLUGIN = PluginInfo(summary="texts in a column of a CSV file", version="0.1.0")


class Settings(Section):
    """The section ``my_plugin`` of the profile."""

    column: str = Field(default="text", min_length=1, description="The column that has the texts.")


@hookimpl
def apt_register_config() -> list[SectionSpec]:
    return [SectionSpec("my_plugin", Settings)]


@hookimpl
def apt_register_providers() -> list[ProviderSpec]:
    return [
        ProviderSpec(
            kind="dataset",
            name="my_plugin",
            factory="apt_my_plugin.source:Provider",
            version=PLUGIN.version,
            summary=PLUGIN.summary,
            config=Settings,
            section="my_plugin",
            files=("train_path",),
        )
    ]
