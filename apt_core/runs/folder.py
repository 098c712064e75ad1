"""The folder of a run: the resolved profile, the manifest, the metrics, the log, checkpoints."""

from __future__ import annotations

import json
import platform
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

from apt_core import __version__
from apt_core.code_source import short_path
from apt_core.errors import ConfigError
from apt_core.files import write_atomically
from apt_core.json_files import json_rows, read_json, without_nan
from apt_core.log import get_logger
from apt_core.profile_paths import RUNS
from apt_core.runs.events import EVENTS, as_row
from apt_core.runs.folder_lock import FolderLock, process_row
from apt_core.runs.layout import CHECKPOINTS, checkpoints_folder, named_folder
from apt_core.runs.metrics import METRICS
from apt_core.runs.rows import RowFile, is_step
from apt_core.secrets import without_secrets

log = get_logger("apt.training")

TEXTS = ("started", "checkpoint_dir", "ended", "error", "sample", "reason")
"""Entries of a manifest that a resumed run reads."""

PACKAGES = ("torch", "pluggy", "pydantic", "numpy", "safetensors")


def in_present_words(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run or of a checkpoint, in whose rows of providers earlier versions wrote
    ``slot`` for ``kind``."""
    rows = manifest.get("providers")
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and "slot" in row:
            row.setdefault("kind", row.pop("slot"))
    return manifest


def versions() -> dict[str, str]:
    """Versions of APT, Python and the packages that decide about results."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    """Read once: metadata are long, and every checkpoint has the versions."""
    found = {"apt": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
        except Exception:  # its metadata are damaged
            found[package] = "unknown"
    return found


def now() -> str:
    """UTC, to the second, as manifests have it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _new_folder(parent: Path, name: str) -> Path:
    """Make a new folder in ``parent``: ``name``, with a number appended if that exists."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("numbers do not end")


def newest_folder(profile_name: str) -> Path | None:
    """The newest default folder of this profile that has a manifest."""
    parent = RUNS / _file_name(profile_name)
    found = [path.parent for path in parent.glob("*/manifest.json")]
    return max(found, key=lambda path: _order_of(path.name), default=None)


def _order_of(name: str) -> tuple[str, int]:
    """The sort key of default folders, which orders them by time: ``TIME`` or ``TIME-2``."""
    numbered = re.fullmatch(r"(\d{8}-\d{6})-(\d{1,9})", name)
    return (numbered[1], int(numbered[2])) if numbered else (name, 1)


def _time_after(parent: Path) -> str:
    """The time as a folder name that sorts after those in ``parent``; if the clock was set back,
    the newest name with the next number."""
    time = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    times = [_order_of(path.name)[0] for path in parent.glob("*")]
    newest = max((each for each in times if re.fullmatch(r"\d{8}-\d{6}", each)), default=time)
    if newest > time:
        log.warning("the clock was ahead when runs/%s/%s was made", parent.name, newest)
    return max(time, newest)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name) or "unnamed"


class RunFolder:
    """Creates and writes a run's folder.

    ``checkpoints`` is where its checkpoints are: inside it, or a folder of its own below the
    profile's ``training.checkpoint_dir`` when no output folder was named. Of several processes only
    the one whose folder ``writes`` does, with a lock on both.
    """

    def __init__(self, path: Path, checkpoints: Path, *, writes: bool = True) -> None:
        # Absolute: a plugin may change the working directory.
        self.path = path.absolute()
        self.checkpoints = checkpoints.absolute()
        self.writes = writes
        self.manifest: dict[str, Any] = {}
        self.ended: dict[str, Any] = {}
        self._metrics = RowFile(self.path / METRICS)
        self._events = RowFile(self.path / EVENTS)
        self._locks: list[FolderLock] = []
        if writes:
            self._locks.append(FolderLock(self.path, "--output"))
            if self.checkpoints.parent != self.path and self.checkpoints.is_dir():
                try:
                    lock = FolderLock(self.checkpoints, "training.checkpoint_dir")
                except BaseException:
                    self.close()
                    raise
                self._locks.append(lock)

    def __str__(self) -> str:
        return short_path(str(self.path))

    @classmethod
    def create(
        cls, output: Path | None, profile_name: str, checkpoint_dir: str | None
    ) -> RunFolder:
        """A new folder: ``output``, else ``runs/PROFILE/TIME``, and then with checkpoints in
        ``PROFILE-TIME`` of ``checkpoint_dir``, if there is one. No two runs get the same.

        Raises ConfigError if ``output`` is in use or cannot be written.
        """
        name = _file_name(profile_name)
        try:
            if output is not None:
                return cls._of(output)
            parent = RUNS / name
            path = _new_folder(parent, _time_after(parent))
            if checkpoint_dir:
                checkpoints = _new_folder(Path(checkpoint_dir), f"{name}-{path.name}")
            else:
                checkpoints = path / CHECKPOINTS
                checkpoints.mkdir()
        except OSError as error:
            raise ConfigError(
                f"the folder cannot be made: {error.strerror}", where=str(error.filename)
            ) from None
        return cls(path, checkpoints)

    @classmethod
    def _of(cls, output: Path) -> RunFolder:
        """A new run in ``output``, which is empty or not there. Raises ConfigError, OSError."""
        in_use = ConfigError(
            "the output folder is in use",
            key="--output",
            where=str(output),
            hint="name another one, or add --resume to go on with the run in it",
        )
        if output.exists() and not output.is_dir():
            raise ConfigError("is a file, not a folder", "--output", str(output))
        output.mkdir(parents=True, exist_ok=True)
        folder = cls(output, output / CHECKPOINTS)
        # Checked with the lock held: another run may have used it meanwhile.
        if any(output.iterdir()):
            folder.close()
            raise in_use
        folder.checkpoints.mkdir()
        return folder

    @classmethod
    def existing(cls, path: Path, checkpoint_dir: str | None = None) -> RunFolder:
        """The folder of an earlier run; its checkpoints inside it are enough to go on with. Where
        there are none, they are below the profile's ``checkpoint_dir``.

        Raises ConfigError if there is no run in it, or one that is still going on.
        """
        inside = path / CHECKPOINTS
        manifest, reason = {}, ""
        try:
            manifest = _known_entries(read_json(path / "manifest.json"))
        except FileNotFoundError:
            reason = "it has no manifest.json"
        except (OSError, ValueError) as error:
            reason = f"manifest.json cannot be read: {getattr(error, 'strerror', None) or error}"
        if not inside.is_dir() and not manifest:
            raise ConfigError(
                f"there is no run to resume in this folder: {reason or 'an empty manifest'}",
                key="--resume",
                where=str(path),
                hint="give the folder of the run with --output, or leave --resume out",
            )
        if reason:
            log.warning("%s: %s; the run goes on from its checkpoints", path, reason)
        checkpoints = checkpoints_folder(path, manifest, checkpoint_dir)
        if checkpoints is None:
            said = named_folder(path, manifest)
            raise ConfigError(
                f"the manifest says that its checkpoints are in {said}, which is not below the "
                "run nor below the profile's training.checkpoint_dir",
                key="--resume",
                where=str(path / "manifest.json"),
                hint=f"if they are: --training.checkpoint_dir {shlex.quote(str(said.parent))}",
            )
        folder = cls(path, checkpoints)
        folder.manifest = manifest
        return folder

    def write_profile(self, text: str) -> None:
        self._write("profile.yaml", text)

    def begin_manifest(self) -> None:
        """Record the start of the run; after a resume, move the entries of its earlier end to
        ``ended``."""
        self.manifest.setdefault("started", now())
        self.manifest["process"] = {**process_row(), "since": now()}
        keys = ("ended", "error", "figures", "sample", "reason")
        self.ended = {key: self.manifest.pop(key) for key in keys if key in self.manifest}

    def write_manifest(self, **entries: Any) -> None:
        """Update some entries of ``manifest.json``."""
        self.manifest.update(entries, checkpoint_dir=str(self.checkpoints.resolve()))
        clean = without_secrets(without_nan(self.manifest))
        text = json.dumps(clean, indent=2, ensure_ascii=False, default=str, allow_nan=False)
        self._write("manifest.json", text + "\n")

    def write_json(self, name: str, value: Any) -> None:
        """Write a file of its own; ``name`` may have folders in it."""
        self._write(name, json.dumps(value, ensure_ascii=False) + "\n")

    def keep(self, name: str, write: Callable[[Path], None]) -> None:
        """Keep what ``write`` writes as the folder ``name``, unless there is one; log an error if
        the disk is full."""
        if not self.writes or (self.path / name).exists():
            return
        made = self.path / f".{name}.tmp"
        try:
            shutil.rmtree(made, ignore_errors=True)  # of a run that was killed
            made.mkdir()
            write(made)
            if any(made.iterdir()):
                made.rename(self.path / name)
            else:
                made.rmdir()
        except OSError as error:
            log.error("%s cannot be written: %s", self.path / name, error)

    def _write(self, name: str, text: str) -> None:
        """Write a record, or log an error if the disk is full: a run does not end for its
        records."""
        if not self.writes:
            return
        path = self.path / name
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, text)
        except OSError as error:
            log.error("%s was not written: %s", name, error)

    @property
    def log_file(self) -> Path:
        return self.path / "log.txt"

    def drop_metrics_after(self, step: int, *, evaluation: bool = False) -> int:
        """Forget rows of steps that a resumed run will take again, and that of an ``evaluation`` of
        ``step`` which it will make again; returns the last step that any row was of. A disk that
        does not take that is tried again before the next row."""
        last = 0

        def drop() -> None:
            nonlocal last
            kept, lost = [], 0
            try:
                for line, row in json_rows(self.path / METRICS):
                    at = None if row is None else row.get("step", 0)
                    if row is None or isinstance(at, bool) or not isinstance(at, int | float):
                        lost += 1  # the last one may have been cut
                        continue
                    if is_step(at):
                        last = max(last, int(at))
                    if at <= step and not (evaluation and at == step and "val_loss" in row):
                        kept.append(line.rstrip(b"\r\n").decode("utf-8") + "\n")
            except FileNotFoundError:
                return
            write_atomically(self.path / METRICS, "".join(kept))
            if lost:
                log.warning("%s: %d lines that are no rows of steps are left out", METRICS, lost)

        self._metrics.first = drop
        try:
            self._metrics.settle()
        except OSError as error:
            log.error("%s: rows of steps to come are still in it: %s", METRICS, error)
        return last

    def write_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one row of metrics."""
        if self.writes:
            self._metrics.append(row)

    def write_event(self, event: Mapping[str, Any]) -> None:
        """Append one event, as :class:`~apt_core.event_log.EventLog` hands it on."""
        if self.writes:
            self._events.append(as_row(event))

    def close(self) -> None:
        self._metrics.close()
        self._events.close()
        for lock in self._locks:
            lock.close()
        self._locks = []


def _known_entries(manifest: Any) -> dict[str, Any]:
    """The valid entries of a run's manifest that a resumed run keeps; it writes the others anew.
    Raises ValueError if the manifest is not a mapping."""
    if not isinstance(manifest, dict):
        raise ValueError("it is not a mapping")
    failed = manifest.get("failed_checkpoints")
    known = {key: manifest[key] for key in TEXTS if isinstance(manifest.get(key), str)}
    figures = manifest.get("figures")
    if isinstance(figures, dict):
        known["figures"] = {k: v for k, v in figures.items() if isinstance(v, int | float)}
    if isinstance(failed, list) and all(isinstance(text, str) for text in failed):
        known["failed_checkpoints"] = failed
    if isinstance(manifest.get("trial"), dict):  # of a study: it stays one, whoever goes on with it
        known["trial"] = manifest["trial"]
    return known
