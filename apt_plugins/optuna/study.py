"""A study: its folder, its trials in Optuna's storage, and the decision what a worker does next."""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from apt_core import ConfigError, Problem
from apt_core.config.differences import differences
from apt_core.files import read_file, write_atomically
from apt_core.runs.folder_lock import FolderLock
from apt_core.runs.layout import list_checkpoints, step_of
from apt_plugins.optuna import records
from apt_plugins.optuna.records import TrialRow, is_paused, run_folder, trial_row
from apt_plugins.optuna.rungs import Climber, promotable
from apt_plugins.optuna.sampling import Given, Refusal, choose, suggest
from apt_plugins.optuna.settings import CLIMBING, Settings, changes
from apt_plugins.optuna.space import Space
from apt_plugins.optuna.storage import JOURNAL, open_storage, reaching

FACTS = "apt"
"""The attribute of an Optuna study that holds its profile, space and settings."""

PLACES = "place:"
"""Before the name of a place: the attributes that say when a worker there was heard of last."""

IGNORED = ("name", "version", "description", "monitoring", "debug")
"""Sections of the profile that may differ between those who work on a study."""
IGNORED_KEYS = (
    "training.checkpoint_dir",
    "training.keep_last",
    "training.save_freq",
    "training.save_every_steps",
    "hardware.num_threads",
    "data.num_workers",
    "data.build_workers",
)

MAX_ATTEMPTS = 3
"""How often the process of a trial may die without a new checkpoint in between."""

LOST_SECONDS = 600.0
"""A folder of the study on another machine of which nobody was heard of so long is lost: its trials
begin anew where work is done."""

BEAT_SECONDS = 30.0


@dataclass(frozen=True)
class Work:
    """A trial to train to a ``target``, an index of the settings' rungs. ``lock`` is the claim on
    it, to be closed when it is left."""

    trial_id: int
    number: int
    params: Mapping[str, Any]
    target: int
    lock: FolderLock
    attrs: Mapping[str, Any]


@dataclass(frozen=True)
class Waiting:
    """There is nothing to do until other workers have gone on."""


@dataclass
class Study:
    """A study that is open. ``url`` is that of its database, None for the journal in ``folder``.

    Every method raises :class:`~apt_plugins.optuna.storage.StorageError` where the storage fails.
    """

    folder: Path
    url: str | None
    settings: Settings
    space: Space
    optuna: optuna.Study
    storage: BaseStorage
    notices: list[str] = field(default_factory=list)
    given: Given = field(default_factory=Given)
    _beat_at: float = 0.0

    def __post_init__(self) -> None:
        self.optuna.sampler = self.given

    @property
    def name(self) -> str:
        return self.optuna.study_name

    # Trials ----------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """The trials by number, without those that were one too many."""
        with reaching(self.url):
            found = self.optuna.get_trials(deepcopy=False)
        return [trial for trial in found if not trial.user_attrs.get(records.SURPLUS)]

    def rows(self) -> list[TrialRow]:
        """The trials as they are shown."""
        return [trial_row(trial) for trial in self.trials() if trial.state != TrialState.WAITING]

    def note(self, trial_id: int, **attrs: Any) -> None:
        """Record attributes of a trial."""
        with reaching(self.url):
            for name, value in attrs.items():
                self.storage.set_trial_user_attr(trial_id, name, value)

    def report(self, trial_id: int, step: int, value: float) -> None:
        """Record the objective of an evaluation after ``step``."""
        with reaching(self.url):
            self.storage.set_trial_intermediate_value(trial_id, step, value)
        self.beat()

    def is_worse(self, trial_id: int) -> bool:
        """Whether the pruner ends the trial after its newest report."""
        if self.settings.pruner in CLIMBING:
            return False
        with reaching(self.url):
            trial = self.storage.get_trial(trial_id)
            if trial.user_attrs.get(records.BASELINE):
                return False
            return _pruner(self.settings).prune(self.optuna, trial)

    def end(
        self, number: int, state: TrialState, value: float | None = None, reason: str = ""
    ) -> None:
        """Record how a trial ended."""
        with reaching(self.url):
            if reason:
                trial = self.optuna.get_trials(deepcopy=False)[number]
                self.note(trial._trial_id, reason=reason)
            self.optuna.tell(number, value, state=state, skip_if_finished=True)

    # Decisions -------------------------------------------------------------------------------

    def next(self, count: int, refusal: Refusal, own: Mapping[str, Any] | None) -> Any:
        """What this worker does next: :class:`Work`, :class:`Waiting`, or None when the study has
        ``count`` trials and all have ended.

        ``own`` are the values of the profile itself, for the first trial; None where the space does
        not hold them. The first of: a trial whose process has died; a paused one that goes on; a
        new one. When none of these is left and nothing trains, the paused ones are pruned.
        """
        with self._deciding():
            self.beat()
            trials = self.trials()
            for trial in trials:
                if _is_running(trial) and self._is_here(trial):
                    lock = self._claim(trial.number)
                    work = lock and self._left(trial, lock, refusal, own)
                    if work is not None:
                        return work
            trials = self.trials()
            started = [t for t in trials if t.state != TrialState.WAITING]
            climbing = self._climbing(started, all_there=len(trials) >= count)
            for trial in climbing:
                if self._is_here(trial) and (lock := self._claim(trial.number)) is not None:
                    return self._goes_on(trial, lock)
            waits = any(t.state == TrialState.WAITING for t in trials)
            if len(trials) < count or waits:
                return self._new(count, trials, refusal, own)
            busy = [t for t in trials if _is_running(t)]
            away = [t for t in [*busy, *climbing] if not self._is_here(t)]
            for trial in away:
                if self._is_lost(trial):
                    lock = self._claim(trial.number)
                    if lock is not None:
                        return self._taken_over(trial, lock)
            if busy or away:
                return Waiting()
            for trial in trials:
                if is_paused(trial):
                    better = f"others were better at step {trial_row(trial).step:,}"
                    self.end(trial.number, TrialState.PRUNED, reason=better)
            return None

    def _climbing(self, trials: Sequence[FrozenTrial], *, all_there: bool) -> list[FrozenTrial]:
        """The paused trials that go on, the first of them first."""
        sign = -1.0 if self.settings.maximize else 1.0
        climbers = [
            Climber(
                number=trial.number,
                bracket=int(trial.user_attrs.get(records.BRACKET, 0)),
                values={int(k): sign * v for k, v in _rungs(trial).items()},
                trains=_is_running(trial),
                waits=is_paused(trial),
                always=bool(trial.user_attrs.get(records.BASELINE)),
            )
            for trial in trials
            if trial.state != TrialState.FAIL
        ]
        by_number = {trial.number: trial for trial in trials}
        numbers = promotable(
            climbers,
            len(self.settings.rungs),
            self.settings.reduction_factor,
            all_there=all_there,
        )
        return [by_number[number] for number in numbers]

    def _goes_on(self, trial: FrozenTrial, lock: FolderLock) -> Work:
        target = max(map(int, _rungs(trial)), default=-1) + 1
        self.note(trial._trial_id, target=target, status=records.RUNNING, attempts=0)
        return self._work(trial._trial_id, target, lock)

    def _left(
        self,
        trial: FrozenTrial,
        lock: FolderLock,
        refusal: Refusal,
        own: Mapping[str, Any] | None,
    ) -> Work | None:
        """A trial that its process has left; None where that has happened too often."""
        run = run_folder(self.folder, trial.number)
        saved = max(map(step_of, list_checkpoints(run / "checkpoints")), default=0)
        attrs = trial.user_attrs
        attempts = int(attrs.get(records.ATTEMPTS, 0))
        attempts = attempts + 1 if saved == attrs.get(records.ATTEMPT_STEP, saved) else 1
        if attempts >= MAX_ATTEMPTS:
            reason = (
                f"its process died {MAX_ATTEMPTS} times after step {saved}; the system may have "
                "killed it for want of memory"
            )
            self.end(trial.number, TrialState.FAIL, reason=reason)
            lock.close()
            return None
        self.note(trial._trial_id, attempts=attempts, attempt_step=saved)
        self._fill(trial._trial_id, trial.number, refusal, own)
        return self._work(trial._trial_id, int(attrs.get(records.TARGET, 0)), lock)

    def _taken_over(self, trial: FrozenTrial, lock: FolderLock) -> Work:
        """A trial whose machine is lost: it begins anew here, and trains as far as it was to."""
        target = int(trial.user_attrs.get(records.TARGET, 0))
        if is_paused(trial):
            target = max(map(int, _rungs(trial)), default=-1) + 1
        self.note(
            trial._trial_id,
            place=self.place,
            folder=str(run_folder(self.folder, trial.number).absolute()),
            status=records.RUNNING,
            target=target,
        )
        return self._work(trial._trial_id, target, lock)

    def _new(
        self,
        count: int,
        trials: Sequence[FrozenTrial],
        refusal: Refusal,
        own: Mapping[str, Any] | None,
    ) -> Work | Waiting:
        with reaching(self.url):
            trial = self.optuna.ask()
        if trial.number >= count and len(self.trials()) > count:
            self.note(trial._trial_id, surplus=True)
            self.end(trial.number, TrialState.FAIL, reason="another machine began the last trial")
            return Waiting()
        lock = self._claim(trial.number)
        assert lock is not None, "a new trial is nobody's"
        try:
            self._fill(trial._trial_id, trial.number, refusal, own)
        except BaseException:
            lock.close()
            raise
        target = self.settings.bracket(trial.number)
        self.note(
            trial._trial_id,
            status=records.RUNNING,
            target=target,
            bracket=target,
            place=self.place,
            folder=str(run_folder(self.folder, trial.number).absolute()),
        )
        return self._work(trial._trial_id, target, lock)

    def _fill(
        self, trial_id: int, number: int, refusal: Refusal, own: Mapping[str, Any] | None
    ) -> None:
        """Give a trial the values that it lacks."""
        with reaching(self.url):
            trial = self.storage.get_trial(trial_id)
        asked = trial.system_attrs.get("fixed_params") or {}
        values = {
            each.key: value
            for each in self.space
            if each.contains(value := trial.params.get(each.key, asked.get(each.key)))
            if each.key in trial.params or each.key in asked
        }
        if self.space.contains(trial.params):
            return
        baseline = number == 0 and own is not None and self.settings.baseline and not values
        if baseline and own is not None:
            chosen = dict(own)
            self.note(trial_id, baseline=True)
        else:
            others = [each for each in self.trials() if each.number != number]
            try:
                chosen = choose(
                    self.space,
                    others,
                    number,
                    direction=self.settings.direction,
                    sampler=self.settings.sampler,
                    seed=self.settings.seed,
                    refusal=refusal,
                    fixed=values,
                )
            except ConfigError as error:
                self.end(number, TrialState.FAIL, reason=str(error))
                raise
        self.given.values = chosen
        with reaching(self.url):
            made = Trial(self.optuna, trial_id)
            for dimension in self.space:
                if dimension.key in chosen:
                    suggest(made, dimension)

    def _work(self, trial_id: int, target: int, lock: FolderLock) -> Work:
        with reaching(self.url):
            trial = self.storage.get_trial(trial_id)
        return Work(trial_id, trial.number, trial.params, target, lock, trial.user_attrs)

    # Locks and places ------------------------------------------------------------------------

    @property
    def place(self) -> str:
        """The name of the study's folder, which machines that share it agree upon."""
        return place_of(self.folder)

    def _is_here(self, trial: FrozenTrial) -> bool:
        """Whether the trial's run is in this folder. One that was left before that was recorded is
        nowhere: it is taken here, unless the storage is one of several folders."""
        place = trial.user_attrs.get(records.PLACE)
        if place is None:
            return self.url is None or len(self._places()) <= 1
        return bool(place == self.place)

    def _places(self) -> dict[str, Any]:
        attrs = self.optuna.user_attrs
        return {
            name.removeprefix(PLACES): value
            for name, value in attrs.items()
            if name.startswith(PLACES)
        }

    def _is_lost(self, trial: FrozenTrial) -> bool:
        known = self._places().get(trial.user_attrs.get(records.PLACE, ""))
        heard = known.get("at", 0.0) if isinstance(known, dict) else 0.0
        return time.time() - heard > LOST_SECONDS

    def beat(self) -> None:
        """Record now and then that somebody works in this folder; needless for a journal, whose
        workers all see the locks."""
        now = time.monotonic()
        if self.url is None or now - self._beat_at < BEAT_SECONDS:
            return
        self._beat_at = now
        row = {"host": platform.node(), "folder": str(self.folder.absolute()), "at": time.time()}
        with reaching(self.url):
            self.optuna.set_user_attr(f"{PLACES}{self.place}", row)

    def _claim(self, number: int) -> FolderLock | None:
        """Take a trial for this process; None if another one of this folder has it."""
        return _locked(self.folder / ".claims" / f"{number:04d}")

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        """One worker at a time decides."""
        while (lock := _locked(self.folder / ".claims" / "decision")) is None:
            time.sleep(0.02)
        try:
            yield
        finally:
            lock.close()


def _locked(path: Path) -> FolderLock | None:
    path.mkdir(parents=True, exist_ok=True)
    try:
        return FolderLock(path, "--study")
    except ConfigError:
        return None


def _is_running(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.RUNNING and not is_paused(trial)


def _rungs(trial: FrozenTrial) -> dict[str, float]:
    found = trial.user_attrs.get(records.RUNGS)
    return found if isinstance(found, dict) else {}


def _pruner(settings: Settings) -> BasePruner:
    if settings.pruner == "median":
        return MedianPruner(n_startup_trials=4)
    return NopPruner()


def place_of(folder: Path) -> str:
    """The name of a study's folder, made with the first question."""
    path = folder / ".place"
    with suppress(OSError):
        if name := read_file(path, 100).decode("ascii", errors="replace").strip():
            return name
    name = uuid.uuid4().hex
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o666)
    os.close(descriptor)
    write_atomically(path, name + "\n")
    return read_file(path, 100).decode("ascii").strip()


# Opening -----------------------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    """Make the folder of a study. Raises ConfigError where nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".claims").mkdir(exist_ok=True)
        (folder / "trials").mkdir(exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "it cannot be written", str(folder))
        place_of(folder)
    except OSError as error:
        raise ConfigError(
            f"the study's folder cannot be made: {error.strerror}",
            "--study",
            str(error.filename or folder),
            "name another one: --study FOLDER",
        ) from None


def open_study(
    folder: Path,
    url: str | None,
    settings: Settings,
    space: Space,
    profile: Mapping[str, Any],
) -> Study:
    """Make a study, or join one that is there. Its folder is there already.

    Raises ConfigError where the study's trials are those of another profile, objective or space.
    Of a space that differs in a way that Optuna allows, ``notices`` tell.
    """
    storage = open_storage(folder, url)
    facts: dict[str, Any] = {
        "profile": dict(profile),
        "space": space.row(),
        "settings": settings.row(),
    }
    known: dict[str, Any] | None
    with reaching(url):
        # A folder may have been renamed: the journal in it has one study.
        names = optuna.get_all_study_names(storage) if url is None else []
        name = names[0] if names else folder.absolute().name
        # Looked for first: even a failed creation is a line of the journal.
        if name not in (names or optuna.get_all_study_names(storage)):
            with suppress(DuplicatedStudyError):  # another process was faster
                made = optuna.create_study(
                    storage=storage, study_name=name, direction=settings.direction
                )
                made.set_user_attr(FACTS, facts)
        opened = optuna.load_study(study_name=name, storage=storage)
        known = _facts(opened, folder)
    study = Study(folder, url, settings, space, opened, storage)
    if known is None:  # its maker has died before it could say more
        with reaching(url):
            opened.set_user_attr(FACTS, facts)
        return study
    problems = [*changes(known["settings"], settings), *_other_profile(known["profile"], profile)]
    told, refused = _other_space(known["space"], space)
    if problems or refused:
        raise ConfigError([*problems, *refused])
    if told:
        study.notices += told
        with reaching(url):
            opened.set_user_attr(FACTS, {**known, "space": space.row()})
    return study


def _facts(study: optuna.Study, folder: Path) -> dict[str, Any] | None:
    """What a study records of itself; None where it has not recorded that yet. Raises ConfigError
    for a study that others made."""
    facts = study.user_attrs.get(FACTS)
    if facts is None and not study.get_trials(deepcopy=False):
        return None
    if not isinstance(facts, dict) or not {"profile", "space", "settings"} <= facts.keys():
        raise ConfigError(
            f"study {study.study_name!r} was not made by apt-tune",
            "--study",
            str(folder),
            "name another folder: a study is called as its folder is",
        )
    return facts


def load_study(folder: Path, url: str | None) -> tuple[Study, dict[str, Any]]:
    """A study to look at, and what it records of itself. Raises ConfigError if there is none."""
    if url is None and not (folder / JOURNAL).is_file():
        hint = "give the folder that apt-tune named, such as studies/PROFILE; --storage for others"
        raise ConfigError("there is no study in this folder", "STUDY", str(folder), hint)
    storage = open_storage(folder, url)
    with reaching(url):
        names = optuna.get_all_study_names(storage)
        name = names[0] if url is None and names else folder.absolute().name
        try:
            opened = optuna.load_study(study_name=name, storage=storage)
        except KeyError:
            hint = f"there are {', '.join(names[:10])}" if names else "it is empty"
            message = f"the storage has no study {name!r}"
            raise ConfigError(message, "STUDY", str(folder), hint) from None
        facts = _facts(opened, folder) or {"profile": {}, "space": {}, "settings": {}}
    known = Settings().row() | {k: v for k, v in facts["settings"].items() if k in Settings().row()}
    return Study(folder, url, Settings(**known), Space(()), opened, storage), facts


def _other_profile(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    for key, old, new in differences(before, now):
        if key.split(".")[0] in IGNORED or key in IGNORED_KEYS:
            continue
        message = f"is {new!r}, and the study's trials were made with {old!r}"
        yield Problem(message, key, hint="put it back, or begin another study: --study FOLDER")


def _other_space(before: Mapping[str, Any], space: Space) -> tuple[list[str], list[Problem]]:
    """What is told of a space that differs from the study's, and what is refused."""
    told, refused = [], []
    for each in space:
        old, new = before.get(each.key), each.row()
        if old is None:
            told.append(f"{each.key}: new in the space: earlier trials tell nothing")
        elif any(old.get(name) != new.get(name) for name in ("kind", "choices", "log")):
            message = "its kind, choices or log differ from those of the study's trials"
            hint = "put them back, or begin another study: --study FOLDER"
            refused.append(Problem(message, each.key, each.where, hint))
        elif old != new:
            told.append(f"{each.key}: its range differs from before: it is {each.in_words()}")
    known = {each.key for each in space}
    told += [
        f"{key}: it is searched no more: earlier trials tell nothing"
        for key in before
        if key not in known
    ]
    return told, refused
