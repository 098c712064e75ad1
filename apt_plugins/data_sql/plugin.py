"""Registers ``dataset:sql``."""

from __future__ import annotations

from apt_core import PluginInfo, ProviderSpec, SectionSpec, hookimpl
from apt_plugins.data_sql.settings import SECTION, SqlSettings, contradictions

PLUGIN = PluginInfo(summary="documents out of a database: a query over SQLAlchemy", version="1.0.0")


@hookimpl
def apt_register_providers() -> list[ProviderSpec]:
    return [
        ProviderSpec(
            kind="dataset",
            name="sql",
            factory="apt_plugins.data_sql.source:SqlSource",
            version="1.0.0",
            summary="the rows of a query, streamed from any database that SQLAlchemy reaches",
            requires=("SQLAlchemy>=2.0.40",),
            section=SECTION,
            config="apt_plugins.data_sql.settings:SqlSettings",
            files=(),
        )
    ]


@hookimpl
def apt_register_config() -> list[SectionSpec]:
    return [SectionSpec(SECTION, SqlSettings, check=contradictions)]
