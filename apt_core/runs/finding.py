"""Finds a run by its profile or age, and a checkpoint by path, step or evaluation."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from apt_core.errors import CheckpointError, ConfigError, did_you_mean
from apt_core.files import read_file
from apt_core.json_files import MAX_BYTES, read_json
from apt_core.profile_paths import RUNS, user_path
from apt_core.runs import checkpoint
from apt_core.runs.checkpoint import Checkpoint
from apt_core.runs.layout import CHECKPOINTS, IS_STEP, checkpoints_folder, named_folder
from apt_core.runs.resume_check import saved_profile
from apt_core.runs.scores import best_by_evaluation

TRIES = 3
"""A run that goes on may have deleted the checkpoints that were listed, but not again and again."""


def find_checkpoint(
    path: Path, key: str, *, step: int | None = None, best: bool = False
) -> Checkpoint:
    """The checkpoint at ``path``, or of the run there (its folder, or that of its checkpoints) that
    of ``step``, the ``best`` by evaluation, or the newest intact one; ``key`` is what the path was
    given as.

    Raises ConfigError if there is nothing of the kind, CheckpointError for one that is not intact.
    """
    if not path.exists():
        raise ConfigError("there is no such checkpoint or run folder", key, str(path))
    if not path.is_dir():
        raise ConfigError("is a file: a checkpoint is a folder", key, str(path))
    if _is_checkpoint(path):
        if best:
            hint = "give the folder of the run"
            raise ConfigError("is one checkpoint: it has no best", key, str(path), hint)
        found = checkpoint.load(path)
        if step is not None and found.state.step != step:
            raise ConfigError(
                f"is the checkpoint of step {found.state.step}, not of {step}", key, str(path)
            )
        return found
    root = _folder_of_checkpoints(path, key)
    if step is not None:
        return checkpoint.load(_of_step(root, step))
    return checkpoint.load(_best(root)) if best else _newest(root)


def newest_run(folder: Path = RUNS) -> Path:
    """The run in ``folder`` (``runs/PROFILE/TIME`` or ``runs/NAME``) that was started or resumed
    last, of those that have a checkpoint. Raises ConfigError if there is none."""
    found = [
        path.parent
        for pattern in ("*/manifest.json", "*/*/manifest.json")
        for path in folder.glob(pattern)
        if not IS_STEP.fullmatch(path.parent.name)
    ]
    for run in sorted(found, key=_since, reverse=True):
        if has_checkpoint(run):
            return run
    raise ConfigError(
        "there is no run with a checkpoint in it",
        where=str(folder),
        hint="train one: apt-train -p tiny_debug; or name the folder of a run",
    )


def run_called(name: str | Path) -> Path:
    """The folder that is meant by ``name``: a run, its checkpoints or one of them; for a folder of
    runs or a profile's name (``runs/tiny_debug``, ``tiny_debug``) the :func:`newest_run` of it.

    Raises ConfigError where there is no checkpoint.
    """
    path = user_path(name)
    for each in (path, RUNS / path):
        if _is_checkpoint(each) or has_checkpoint(each):
            return each
        with suppress(ConfigError):
            return newest_run(each)
    if not path.exists():
        there = [str(each) for each in (*RUNS.glob("*"), *RUNS.glob("*/*"))]
        near = did_you_mean(str(path), [*there, *(Path(each).name for each in there)])
        raise ConfigError("there is no such run", "RUN", str(path), near)
    if not path.is_dir():
        raise ConfigError("is a file: a run is a folder", "RUN", str(path))
    raise ConfigError(
        "there is no checkpoint in this folder",
        "RUN",
        str(path),
        "give the folder of a run, such as runs/PROFILE/TIME, once it has saved one",
    )


def has_checkpoint(run: Path) -> bool:
    """Whether there is a checkpoint of the run in the folder ``run``, intact or not."""
    try:
        return bool(checkpoint.list_checkpoints(_folder_of_checkpoints(run, "")))
    except ConfigError:
        return False


def run_of(path: Path) -> Path:
    """The folder of the run whose checkpoint is at ``path``, if it can be found."""
    return path.parent.parent if path.parent.name == CHECKPOINTS else path.parent


def _since(run: Path) -> tuple[str, int]:
    """When the run was started or resumed last, as its manifest has it, and when that was
    written."""
    file = run / "manifest.json"
    since: Any = ""
    written = 0
    with suppress(OSError, ValueError, AttributeError):
        written = file.stat().st_mtime_ns
        manifest = read_json(file)
        since = manifest.get("process", {}).get("since") or manifest.get("started")
    return since if isinstance(since, str) else "", written


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and (
        IS_STEP.fullmatch(path.name) is not None or (path / "state.json").exists()
    )


def _folder_of_checkpoints(path: Path, key: str) -> Path:
    """Where the checkpoints of the run at ``path`` are, or ``path`` itself where that is no run's
    folder. Raises ConfigError for a manifest that names another place than its profile does."""
    inside = path / CHECKPOINTS
    if inside.is_dir() or not (path / "manifest.json").is_file():
        return inside if inside.is_dir() else path
    try:
        manifest = read_json(path / "manifest.json")
        profile = saved_profile(read_file(path / "profile.yaml", MAX_BYTES).decode("utf-8"))
    except (OSError, ValueError, CheckpointError):
        return path
    manifest = manifest if isinstance(manifest, dict) else {}
    training = profile.get("training")
    named = training.get("checkpoint_dir") if isinstance(training, dict) else None
    named = named if isinstance(named, str) and "\0" not in named else None
    root = checkpoints_folder(path, manifest, named)
    if root is None:
        raise ConfigError(
            f"its manifest says that the checkpoints are in {named_folder(path, manifest)}, "
            "which is not below the run nor below its profile's training.checkpoint_dir",
            key,
            str(path),
            "if they are: give that folder",
        )
    return root


def _newest(root: Path) -> Checkpoint:
    for _ in range(TRIES - 1):
        there = checkpoint.list_checkpoints(root)
        try:
            return checkpoint.newest_intact(root)
        except CheckpointError:
            if checkpoint.list_checkpoints(root) == there:
                raise
    return checkpoint.newest_intact(root)


def _of_step(root: Path, step: int) -> Path:
    there = checkpoint.list_checkpoints(root)
    for path in there:
        if checkpoint.step_of(path) == step:
            return path
    steps = ", ".join(str(checkpoint.step_of(path)) for path in there)
    hint = f"there are those of steps {steps}" if steps else "there is none at all"
    raise ConfigError(f"there is no checkpoint of step {step}", "step", str(root), hint)


def _best(root: Path) -> Path:
    best = best_by_evaluation(root)
    if best is None:
        raise ConfigError(
            "no checkpoint there was evaluated",
            "weights",
            str(root),
            "evaluation.eval_freq and training.save_every_steps decide which are; or take last",
        )
    return best[0]
