"""Reads the folder of a run, also one that is incomplete or damaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from apt_core.config.yaml_text import parse_yaml
from apt_core.errors import ConfigError
from apt_core.files import read_file, require_inside
from apt_core.json_files import parse_json
from apt_core.runs.events import EVENTS, Event, read_events
from apt_core.runs.folder import in_present_words
from apt_core.runs.layout import checkpoints_folder, list_checkpoints
from apt_core.runs.metrics import METRICS, Metrics, read_metrics
from apt_core.secrets import SecretValues, named_secrets, redact
from apt_plugins.report.metrics import Series

MAX_RUNS = 8
"""A page compares as many as it has colours."""

MAX_FILE = 100_000_000
"""Most bytes of a manifest or a profile that are read."""

MAX_PROFILE = 200_000
"""Most characters of the profile that are shown."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, the time of writing, its size in bytes."""

    path: Path
    written: str
    bytes: int


@dataclass
class Run:
    """What the folder of a run holds; ``notes`` says what could not be read."""

    folder: Path
    manifest: dict[str, Any]
    metrics: Metrics
    series: dict[str, Series]
    events: list[Event]
    profile: str
    settings: dict[str, Any]
    checkpoints: list[Checkpoint]
    last_row_at: str
    notes: list[str] = field(default_factory=list)

    def rows(self, key: str) -> list[dict[str, Any]]:
        """A list of mappings in the manifest; empty where there is none."""
        return mappings(self.manifest.get(key))

    def entries(self, key: str) -> dict[str, Any]:
        """A mapping in the manifest; empty where there is none."""
        value = self.manifest.get(key)
        return dict(value) if isinstance(value, dict) else {}

    def setting(self, section: str, key: str) -> Any:
        """A value of the resolved profile, or None."""
        values = self.settings.get(section)
        return values.get(key) if isinstance(values, dict) else None


def mappings(value: Any) -> list[dict[str, Any]]:
    """The mappings in ``value`` where it is a list; empty for anything else."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def read_run(folder: Path) -> Run:
    """Read the folder of a run that is running, has ended, or was killed while writing."""
    notes: list[str] = []
    manifest = _manifest(folder / "manifest.json", notes)
    metrics, history = read_metrics(folder), read_events(folder)
    notes += [*metrics.notes, *history.notes]
    if not (folder / EVENTS).exists():
        notes.append("the timeline has only the events of manifest.json")
    profile = _text(folder / "profile.yaml")
    if profile is None:
        notes.append(_missing(folder / "profile.yaml"))
    settings = _settings(profile or "", notes)
    return Run(
        folder=folder,
        manifest=manifest,
        metrics=metrics,
        series={
            name: Series(name, each.steps, each.values) for name, each in metrics.series.items()
        },
        events=history.events,
        profile=_shown(profile or "", settings)[:MAX_PROFILE],
        settings=settings,
        checkpoints=_checkpoints(folder, manifest, settings),
        last_row_at=_changed_at(folder / METRICS),
        notes=notes,
    )


def _text(path: Path) -> str | None:
    try:
        require_inside(path.parent, path)
        return read_file(path, MAX_FILE).decode("utf-8", errors="replace")
    except OSError:
        return None


def _missing(path: Path) -> str:
    """The note for a file that gave no text: it is missing or cannot be read."""
    return f"{path.name} cannot be read" if path.exists() else f"there is no {path.name}"


def _manifest(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _text(path)
    try:
        manifest = None if text is None else parse_json(text)
    except ValueError:
        manifest = None
    if isinstance(manifest, dict):
        return in_present_words(manifest)
    notes.append(_missing(path))
    return {}


def _settings(profile: str, notes: list[str]) -> dict[str, Any]:
    try:
        settings = parse_yaml(profile, "profile.yaml").data
    except ConfigError:
        notes.append("profile.yaml cannot be read as YAML")
        return {}
    return settings if isinstance(settings, dict) else {}


def _shown(profile: str, settings: dict[str, Any]) -> str:
    """The profile with secrets removed, which older versions wrote into it."""
    secrets = SecretValues()
    secrets.add(named_secrets(settings))
    return redact(profile)


def _checkpoints(
    folder: Path, manifest: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[Checkpoint]:
    """The complete checkpoints, oldest first."""
    training = settings.get("training")
    named = training.get("checkpoint_dir") if isinstance(training, dict) else None
    if not isinstance(named, str) or "\0" in named:
        named = None
    home = checkpoints_folder(folder, manifest, named)
    found = []
    for path in list_checkpoints(home) if home is not None else ():
        try:
            if (path / "manifest.json").is_file():
                total = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                found.append(Checkpoint(path, _changed_at(path / "manifest.json"), total))
        except FileNotFoundError:
            continue  # the run has just pruned it
    return found


def _changed_at(path: Path) -> str:
    try:
        seconds = path.stat().st_mtime
    except FileNotFoundError:
        return ""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
