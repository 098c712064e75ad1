"""One of two distributions that call their plugin alike."""

from __future__ import annotations

from apt_core import PluginInfo

PLUGIN = PluginInfo(summary="twin one")
