"""pytest fixtures for plugin authors: ``pytest_plugins = ["apt_core.testing.fixtures"]``."""

from __future__ import annotations

import pytest

from apt_core.plugin_manager import PluginManager
from apt_core.testing.recorder import Recorder


@pytest.fixture
def strict_manager() -> PluginManager:
    """A manager under which the first failure of a plugin raises."""
    return PluginManager(strict=True)


@pytest.fixture
def recorder(strict_manager: PluginManager) -> Recorder:
    """A recorder that is registered with ``strict_manager``."""
    recorder = Recorder()
    strict_manager.register(recorder, "recorder")
    return recorder
