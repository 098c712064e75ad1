"""What the plugins of trackers share: their settings, histograms, and the events of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from apt_core import SectionSpec, hookimpl
from apt_core.runs.events import Event, EventTail
from apt_plugins.tracking.histograms import Histograms
from apt_plugins.tracking.settings import TrackerSettings, inactive_of

if TYPE_CHECKING:
    from apt_core.config import Config


class Tracker:
    """One run's tracker. A subclass names its ``section`` and the ``settings_model`` of it, sets
    ``_events`` when training starts, and reports in the background."""

    section: ClassVar[str]
    settings_model: ClassVar[type[TrackerSettings]]

    def __init__(self) -> None:
        self._settings: Any = self.settings_model()
        self._histograms = Histograms(0)
        self._events: EventTail | None = None

    @hookimpl
    def apt_register_config(self) -> list[SectionSpec]:
        return [SectionSpec(self.section, self.settings_model, inactive=inactive_of(self.section))]

    @hookimpl
    def apt_configure(self, config: Config) -> None:
        self._settings = config.section(self.section)
        self._histograms = Histograms(self._settings.histograms_every_steps)

    @hookimpl
    def on_step_end(self, step: int, trainer: Any) -> None:
        if self._settings.histograms_every_steps and trainer.rank == 0:
            self._histograms.make(step, trainer.model)

    def _new_events(self) -> Sequence[Event]:
        """Those of the run since the last time."""
        return () if self._events is None else self._events.new()
