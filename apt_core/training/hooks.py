"""Lets the trainer's helpers call hooks that receive the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from apt_core.plugin_manager import PluginManager


class TrainerHooks:
    """Calls hooks of ``manager`` with ``trainer`` as an argument."""

    def __init__(self, manager: PluginManager, trainer: object) -> None:
        self.manager = manager
        self.trainer = trainer

    def call(self, name: str, **arguments: Any) -> Any:
        """Call the hook of all plugins; returns the manager's combined result."""
        return getattr(self.manager.hook, name)(trainer=self.trainer, **arguments)

    def call_each(self, name: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Call the hook of each plugin in turn; yields (plugin, result)."""
        yield from self.manager.call_each(name, trainer=self.trainer, **arguments)

    def call_plugin(self, plugin: str, name: str, **arguments: Any) -> Any:
        """Call the hook of one plugin."""
        return self.manager.call_plugin(plugin, name, trainer=self.trainer, **arguments)
