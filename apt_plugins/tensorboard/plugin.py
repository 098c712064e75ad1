"""Writes what a run reports into event files of TensorBoard, in the background."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from apt_core import PluginInfo, RunFacts, hookimpl
from apt_core.runs.events import EventTail
from apt_plugins.tensorboard.settings import SECTION, TensorboardSettings
from apt_plugins.tracking.figures import ended, figures_of, flat, line_of
from apt_plugins.tracking.kept import Kept
from apt_plugins.tracking.tracker import Tracker

if TYPE_CHECKING:
    from apt_plugins.tensorboard.events import EventFile

PLUGIN = PluginInfo(
    observer=True,
    summary="event files for TensorBoard: figures, texts, histograms",
    version="1.0.0",
    requires=("tensorboard>=2.16",),
)


class Plugin(Tracker):
    """The event files of one run."""

    section, settings_model = SECTION, TensorboardSettings
    _settings: TensorboardSettings

    def __init__(self) -> None:
        super().__init__()
        self._file: EventFile | None = None
        self._resumed: int | None = None
        self._last = 0

    @hookimpl(background=True)
    def on_resume(self, step: int) -> None:
        self._resumed = step

    @hookimpl(background=True)
    def on_training_start(self, run: RunFacts) -> None:
        if run.rank:
            return
        from apt_plugins.tensorboard.events import EventFile

        folder = self._folder(run)
        begins_at = None if self._resumed is None else self._resumed + 1
        self._file, self._events = EventFile(folder, begins_at), EventTail(run.folder)
        lines = [f"| {key} | {_cell(value)} |" for key, value in flat(run.settings)]
        table = "\n".join(["| key | value |", "|---|---|", *lines])
        self._file.text(run.step, "profile", table)
        self._tell_events()

    @hookimpl(background=True)
    def on_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if self._file is None:
            return
        self._last = step
        self._file.scalars(step, figures_of(metrics))
        for at, histograms in self._histograms.take():
            self._file.histograms(at, histograms)
        self._tell_events()

    @hookimpl(background=True)
    def on_training_end(self, run: RunFacts) -> None:
        self._end(run)

    @hookimpl(background=True)
    def on_exception(self, run: RunFacts) -> None:
        self._end(run)

    def _end(self, run: RunFacts) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        self._tell_events_to(file)
        for name, text in ended(run.folder).items():
            tag = "sample" if name == "sample" else f"run/{name}"
            file.text(max(run.step, self._last), tag, text)
        file.close()

    def _tell_events(self) -> None:
        if self._file is not None:
            self._tell_events_to(self._file)

    def _tell_events_to(self, file: EventFile) -> None:
        for event in self._new_events():
            file.text(event.step, "events", line_of(event))

    def _folder(self, run: RunFacts) -> Path:
        """The folder of the event files, the same in each part of a run."""
        if self._settings.log_dir is None:
            return run.folder / "tensorboard"
        kept = Kept(run.folder, "tensorboard")
        root, known = Path(self._settings.log_dir), kept.get("folder")
        if known and Path(known).parent == root:
            return Path(known)
        folder, number = root / run.folder.name, 1
        while folder.exists():  # another run's of the same name
            number += 1
            folder = root / f"{run.folder.name}-{number}"
        folder.mkdir(parents=True)
        kept.put(folder=str(folder))
        return folder


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
