"""Registers ``dataset:hf_datasets``."""

from __future__ import annotations

from apt_core import PluginInfo, ProviderSpec, SectionSpec, hookimpl
from apt_plugins.data_hf.settings import PROVIDER, SECTION, HfSettings, contradictions

PLUGIN = PluginInfo(
    summary="documents out of Hugging Face datasets: local folders, or names on the hub",
    version="1.0.0",
)


@hookimpl
def apt_register_providers() -> list[ProviderSpec]:
    return [
        ProviderSpec(
            kind="dataset",
            name=PROVIDER,
            factory="apt_plugins.data_hf.source:HfSource",
            version="1.0.0",
            summary="Hugging Face datasets: folders of save_to_disk, data files, names on the hub",
            requires=("datasets>=4",),
            section=SECTION,
            config="apt_plugins.data_hf.settings:HfSettings",
        )
    ]


@hookimpl
def apt_register_config() -> list[SectionSpec]:
    return [SectionSpec(SECTION, HfSettings, check=contradictions)]
