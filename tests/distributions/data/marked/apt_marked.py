"""A plugin that leaves a mark when it is imported."""

from __future__ import annotations

import os
from pathlib import Path

from apt_core import PluginInfo

PLUGIN = PluginInfo(summary="leaves a mark when it is imported")

Path(os.environ["APT_MARK"]).touch()
