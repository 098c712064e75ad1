"""The profile: from YAML text to a validated, immutable :class:`Config`.

``read_profile`` finds and reads, ``validate`` checks and reports every problem at once.
"""

from __future__ import annotations

from apt_core.config.checks import check_files, check_task_files
from apt_core.config.inactive import inactive_core_settings, refusal, written_inactive
from apt_core.config.json_schema import json_schema
from apt_core.config.loader import core_text, read_profile
from apt_core.config.messages import key_like
from apt_core.config.overrides import Override, parse_override
from apt_core.config.reference import (
    KeyFacts,
    all_keys,
    describe_key,
    describe_settings,
    profile_reference,
    settings_tables,
)
from apt_core.config.schema import Config, PluginRequest
from apt_core.config.source import InactiveKey, Source
from apt_core.config.validate import Validated, parse_config, validate
from apt_core.profile_paths import list_profiles
from apt_core.sections import Ramp, Section

__all__ = [
    "Config",
    "InactiveKey",
    "KeyFacts",
    "Override",
    "PluginRequest",
    "Ramp",
    "Section",
    "Source",
    "Validated",
    "all_keys",
    "check_files",
    "check_task_files",
    "core_text",
    "describe_key",
    "describe_settings",
    "inactive_core_settings",
    "json_schema",
    "key_like",
    "list_profiles",
    "parse_config",
    "parse_override",
    "profile_reference",
    "read_profile",
    "refusal",
    "settings_tables",
    "validate",
    "written_inactive",
]
