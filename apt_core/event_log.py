"""Records the events of a run by one call, as a line of the log and as data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

Row = dict[str, Any]

MAX_WAITING = 1000
"""The most events that are kept until a run has its folder."""


class EventLog:
    """Logs events of one run and hands each as a row to whoever keeps them.

    A row has ``time`` (UTC), ``step``, ``kind``, the ``message`` that was logged, and what belongs
    to its kind; see :data:`apt_core.runs.events.KINDS`.
    """

    def __init__(self) -> None:
        self._keep: Callable[[Row], None] | None = None
        self._waiting: list[Row] = []

    def record(
        self,
        kind: str,
        message: str,
        *,
        step: int,
        log: logging.Logger,
        level: int = logging.INFO,
        **data: Any,
    ) -> None:
        """Log ``message`` at ``level``, and record it with ``data``."""
        log.log(level, "%s", message)
        row = {"time": _now(), "step": step, "kind": kind, "message": message, **data}
        if self._keep is not None:
            self._keep(row)
        elif len(self._waiting) < MAX_WAITING:
            self._waiting.append(row)

    @contextmanager
    def kept_with(self, keep: Callable[[Row], None]) -> Iterator[None]:
        """Hand to ``keep`` what has been recorded, and what will be while the context lasts."""
        waiting, self._waiting = self._waiting, []
        self._keep = keep
        try:
            for row in waiting:
                keep(row)
            yield
        finally:
            self._keep = None


def _now() -> str:
    """UTC, to the millisecond."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
