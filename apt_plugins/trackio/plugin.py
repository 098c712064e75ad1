"""Writes what a run reports into the local database of trackio, in the background."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from apt_core import PluginInfo, RunFacts, hookimpl
from apt_core.runs.events import EventTail
from apt_plugins.tracking.figures import ended, figures_of, flat, line_of
from apt_plugins.tracking.kept import Kept
from apt_plugins.tracking.tracker import Tracker
from apt_plugins.trackio.settings import SECTION, TrackioSettings

if TYPE_CHECKING:
    pass

PLUGIN = PluginInfo(
    observer=True,
    summary="runs in trackio's local database; needs no account and no network",
    version="1.0.0",
    requires=("trackio>=0.40",),
)

BUSY_SECONDS = 30.0
"""How long to wait for another process that writes to the database."""


class Plugin(Tracker):
    """One run in the database."""

    section, settings_model = SECTION, TrackioSettings
    _settings: TrackioSettings

    def __init__(self) -> None:
        super().__init__()
        self._storage: Any = None
        self._row: dict[str, Any] = {}
        self._resumed: int | None = None
        self._last = 0

    @hookimpl(background=True)
    def on_resume(self, step: int) -> None:
        self._resumed = step

    @hookimpl(background=True)
    def on_training_start(self, run: RunFacts) -> None:
        if run.rank:
            return
        from trackio.sqlite_storage import SQLiteStorage

        kept = Kept(run.folder, "trackio")
        known = kept.get("id")
        name = known or secrets.token_hex(4)
        project = kept.get("project") or self._settings.project or run.name
        kept.put(id=name, project=project)
        self._events, self._storage = EventTail(run.folder), SQLiteStorage
        # Names need not differ: the id tells runs apart.
        self._row = {"project": project, "run": run.folder.name, "run_id": name}
        if known and self._resumed is not None:
            self._take_back(project, name, self._resumed)
        self._log(run.step, {"event": "the run begins"}, config=dict(flat(run.settings)))
        self._tell_events()

    @hookimpl(background=True)
    def on_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if self._storage is None:
            return
        self._last = step
        self._log(step, figures_of(metrics))
        for at, histograms in self._histograms.take():
            from trackio import Histogram

            pairs = {each.name: (each.counts, each.edges) for each in histograms}
            shown = {key: Histogram(np_histogram=pair) for key, pair in pairs.items()}
            self._log(at, {key: each._to_dict() for key, each in shown.items()})
        self._tell_events()

    @hookimpl(background=True)
    def on_training_end(self, run: RunFacts) -> None:
        self._end(run)

    @hookimpl(background=True)
    def on_exception(self, run: RunFacts) -> None:
        self._end(run)

    def _log(self, step: int, values: Mapping[str, Any], config: Any = None) -> None:
        self._storage.bulk_log(
            metrics_list=[dict(values)], steps=[step], config=config, **self._row
        )

    def _tell_events(self) -> None:
        for event in self._new_events():
            self._log(event.step, {"event": line_of(event)})

    def _take_back(self, project: str, name: str, step: int) -> None:
        """Delete what the run has reported of steps that it takes again."""
        path = self._storage.get_project_db_path(project)
        if path.exists():
            with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection, connection:
                connection.execute(
                    "DELETE FROM metrics WHERE run_id = ? AND step > ?", (name, step)
                )

    def _end(self, run: RunFacts) -> None:
        if self._storage is None:
            return
        self._tell_events()
        facts = ended(run.folder)
        self._log(max(run.step, self._last), {"page": str(run.folder / "report.html"), **facts})
        self._storage = None
