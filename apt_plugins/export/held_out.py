"""The run's held-out text: for prompts, and to score what dropping a part costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from apt_core import AptError
from apt_core.evaluation.held_out import open_held_out
from apt_core.evaluation.scoring import Scoring, items_of, score
from apt_core.evaluation.tasks.held_out import HeldOutTask, TextTask
from apt_core.log import get_logger
from apt_core.providers.task import EncodedPassage
from apt_core.runs import Session
from apt_plugins.export.questions import TEXTS

log = get_logger("apt.export")

DOCUMENTS = 64
"""The documents that are looked at, spread over all."""


class HeldOutText:
    """The documents that the run of ``session`` has held out, or texts of our own where these
    cannot be read."""

    def __init__(self, session: Session) -> None:
        self._held_out: Any = None
        try:
            held_out = open_held_out(session)
            if len(held_out.passages()):
                self._held_out = held_out
        except (AptError, OSError) as error:
            log.warning(
                "the run's held-out text is not there, texts of our own are used: %s", error
            )

    def prompts(self) -> list[tuple[int, ...]]:
        """The ids of some documents; empty where the run's cannot be read."""
        if self._held_out is None:
            return []
        passages: Sequence[EncodedPassage] = self._held_out.passages()
        number = min(DOCUMENTS, len(passages))
        return [passages[n * len(passages) // number].ids for n in range(number)]

    def bits_per_byte(
        self, session: Session, advance: Callable[[float], None] = lambda share: None
    ) -> tuple[float, str]:
        """The bits per byte of a session's model on it, and what the text is."""
        scoring = Scoring(limit=DOCUMENTS)
        if self._held_out is None:
            items = items_of("text", TextTask(TEXTS), scoring)
            text = "texts of our own"
        else:
            items = items_of("held_out", HeldOutTask(), scoring, self._held_out)
            text = f"{len(items.chosen)} of {items.total} held-out documents"
        found = score(session, items, scoring.asking(advance))
        assert found is not None
        return found.figures["bits_per_byte"].value, text
