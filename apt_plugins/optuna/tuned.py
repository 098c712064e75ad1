"""The profile that is tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apt_core.config import Override, Source
from apt_core.kernel import Kernel, boot
from apt_core.plugin_manager import PluginManager


@dataclass(frozen=True)
class Tuned:
    """The profile that is tuned, as it was read when the command began, and how trials differ from
    it beside their values. ``strict`` is that of apt-train."""

    source: Source
    plugins: Sequence[str] = ()
    strict: bool = False

    def boot(
        self, overrides: Sequence[Override], manager: PluginManager | None = None, **options: Any
    ) -> Kernel:
        """The profile with other values, checked. Raises ConfigError."""
        return boot(
            self.source,
            plugins=self.plugins,
            overrides=overrides,
            strict=self.strict,
            manager=manager,
            **options,
        )
