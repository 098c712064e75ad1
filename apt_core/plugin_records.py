"""Records of plugins: origin, state and failures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from apt_core.code_source import source_of
from apt_core.error_text import formatted, one_line, where_raised
from apt_core.types import PluginFailure

FAILURES_IN_ALL = 3
"""Failures of any kind after which a plugin is quarantined; a hook may have a lower limit."""


NOT_IN_EFFECT = {
    "inactive": "a key of the profile that nothing reads there",
    "dormant": "an active plugin outside of its schedule",
    "blocked": "a plugin excluded by `--plugin no:NAME`",
    "broken": "a plugin that cannot be loaded, or does not declare what it should",
    "quarantined": "a plugin that failed too often in this run",
}
"""The words for what is not in effect, in output, documentation and code. Each comes with a
reason."""

STATES = ("available", "active", "dormant", "blocked", "broken", "quarantined")
"""The states of a plugin: available ones are installed and not asked for."""


@dataclass
class PluginRecord:
    """The state of one plugin, its origin and its failures.

    ``state`` is one of STATES; ``reason`` says why for those of NOT_IN_EFFECT. ``priority`` is the
    profile's override, ``source_sha256`` the hash of the plugin's code as loaded by the run.
    ``leftovers`` records changes of the process that a call of the plugin left behind and that were
    put back; they are reported and do not count towards a quarantine. ``dropped`` counts, by hook,
    calls in the background that were not made.
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
    dropped: dict[str, int] = field(default_factory=dict)

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

    def row(self, *names: str) -> dict[str, Any]:
        """Some fields for a manifest or a listing; of ``failures`` the rows."""
        known = {"failures": self.failure_rows()}
        return {name: known.get(name, getattr(self, name)) for name in names}

    def failure_rows(self) -> list[dict[str, Any]]:
        """The failures as the manifest and ``apt-hooks plugins --json`` show them."""
        return [
            {"hook": f.hook, "step": f.step, "error": f.error, "where": f.where}
            for f in (*self.failures, *self.leftovers)
        ]
