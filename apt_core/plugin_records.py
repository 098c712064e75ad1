"""What is known of a plugin: where it is from, its state, and how it failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from apt_core.code_source import source_of
from apt_core.error_text import formatted, one_line, where_raised
from apt_core.types import PluginFailure

FAILURES_IN_ALL = 3
"""Failures of any kind after which a plugin is quarantined; a hook may have a lower limit."""


@dataclass
class PluginRecord:
    """What is known of one plugin.

    ``state`` is one of available, active, dormant (waits for its schedule), blocked, broken,
    quarantined; ``reason`` says why for the last three. ``priority`` is the profile's override,
    ``source_sha256`` the hash of the plugin's code as a run has loaded it. ``leftovers`` is what
    calls had left changed in the process and was put back: told, and no reason for a quarantine.
    """

    name: str
    dist: str = ""
    version: str = ""
    priority: int | None = None
    state: str = "available"
    failures: list[PluginFailure] = field(default_factory=list)
    load_ms: float = 0.0
    summary: str = ""
    reason: str = ""
    on_failure: str = "isolate"
    source_sha256: str = ""
    leftovers: list[PluginFailure] = field(default_factory=list)

    def add_failure(
        self, error: BaseException, *, hook: str, limit: int, step: int, code: Any
    ) -> PluginFailure:
        """Keep what there is to say of a failure in ``hook``, raised by ``code`` or below it.

        ``limit`` is the number of failures in this hook that the plugin may have.
        """
        count = len(self.failures) + 1
        in_hook = 1 + sum(failure.hook == hook for failure in self.failures)
        failure = PluginFailure(
            plugin=self.name,
            hook=hook,
            step=step,
            error=one_line(error),
            where=where_raised(error, *source_of(code)),
            count=count,
            quarantined=count >= FAILURES_IN_ALL or in_hook >= limit,
            traceback=formatted(error),
        )
        self.failures.append(failure)
        return failure

    def failure_rows(self) -> list[dict[str, Any]]:
        """The failures as the manifest and ``apt-hooks plugins --json`` show them."""
        return [
            {"hook": f.hook, "step": f.step, "error": f.error, "where": f.where}
            for f in (*self.failures, *self.leftovers)
        ]
