"""Checkpoints: a folder of safetensors and JSON that is complete or does not exist.

``step-00001234/`` holds ``model.safetensors``, ``optimizer.safetensors`` (keyed by parameter name),
``ema.safetensors`` where there is an average of the weights, ``average-N.safetensors`` for those
that plugins keep (a sharded run has folders of shards in place of these), ``plugins.safetensors``,
``state.json``, ``profile.yaml`` and ``manifest.json`` with the sha256 of each file and of what it
says itself. It is written under a temporary name, fsynced, and renamed; without its manifest, or
with a file that does not match it, it is not used. ``evaluation.json`` holds the scores of these
weights; it may be written later, and has its own sha256. Nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from apt_core.errors import CheckpointError
from apt_core.files import flush, open_file, read_file
from apt_core.json_files import MAX_BYTES
from apt_core.log import get_logger
from apt_core.parallel.world import ALONE, World
from apt_core.plugin_state import TENSOR_KEY
from apt_core.runs.folder import in_present_words
from apt_core.runs.layout import IS_STEP, PREFIX
from apt_core.runs.layout import folder_name as folder_name
from apt_core.runs.layout import list_checkpoints as list_checkpoints
from apt_core.runs.layout import step_of as step_of
from apt_core.runs.resume_check import saved_profile
from apt_core.runs.run_state import RunState
from apt_core.runs.scores import Evaluated, digest, read_evaluation, read_mapping, write_evaluation
from apt_core.runs.tensor_files import SUFFIX, SavedTensors, write_shards, write_whole

log = get_logger("apt.checkpoint")

FORMAT = 1
ROWS = {"providers": ("kind", "asked", "used"), "plugins": ("name",)}
"""Lists of rows in the manifest, with the texts that each row must have."""


@dataclass
class Snapshot:
    """Everything that a checkpoint holds. ``tensors`` are those of ``model``, ``optimizer`` and, as
    there are any, ``ema`` and ``average-N``, by name; they are on the CPU, contiguous and unshared,
    and each process may hold shards. ``state`` is JSON: nothing of a snapshot changes as the run
    goes on."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    plugins: dict[str, Tensor]
    state: str
    profile: str
    manifest: dict[str, Any] = field(default_factory=dict)
    evaluated: Evaluated | None = None


def save(
    root: Path,
    snapshot: Snapshot,
    world: World = ALONE,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint; returns its folder. Raises OSError, leaving nothing half-written.

    With ``group``, all the processes of ``world`` call this together, and each writes its shards.
    """
    target = root / folder_name(snapshot.step)
    temporary = root / f".{target.name}.tmp"

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def complete() -> Path:
        write_whole(temporary / "plugins", snapshot.plugins)
        (temporary / "state.json").write_text(snapshot.state, "utf-8", "backslashreplace")
        (temporary / "profile.yaml").write_text(snapshot.profile, encoding="utf-8")
        files = {
            path.relative_to(temporary).as_posix(): _sha256(path) for path in _files(temporary)
        }
        manifest = {"format": FORMAT, "step": snapshot.step, **snapshot.manifest, "sha256": files}
        sealed = {**manifest, "manifest_sha256": digest(manifest)}
        text = json.dumps(sealed, indent=1, ensure_ascii=False) + "\n"
        (temporary / "manifest.json").write_text(text, encoding="utf-8")
        if snapshot.evaluated is not None:
            write_evaluation(temporary, snapshot.evaluated)
        for path in _files(temporary):
            flush(path)
        for folder in {path.parent for path in _files(temporary)}:
            flush(folder)
        _put_in_place(temporary, target)
        flush(root)
        return target

    try:
        if group is None:
            begin()
            for name, tensors in snapshot.tensors.items():
                write_whole(temporary / name, tensors)
            return complete()
        world.from_first(begin, group)
        for name, tensors in snapshot.tensors.items():
            write_shards(temporary / name, tensors, group)
        return world.from_first(complete, group)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename so that at every moment the old or the new checkpoint exists."""
    if not target.exists():
        temporary.rename(target)
        return
    old = target.with_name(f".{target.name}.replaced.tmp")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def sweep(root: Path) -> None:
    """Clean up after a run that was killed while saving: restore an old checkpoint that was moved
    away, and delete unfinished ones."""
    for path in root.glob(f".{PREFIX}*.replaced.tmp"):
        target = root / path.name.removeprefix(".").removesuffix(".replaced.tmp")
        if not target.exists():
            path.rename(target)
    for path in root.glob(f".{PREFIX}*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: its small parts, and the location of its tensors."""

    path: Path
    state: RunState
    plugins: dict[str, Tensor]
    profile: str
    manifest: dict[str, Any]

    @property
    def names(self) -> set[str]:
        """The names that :meth:`tensors` takes."""
        return {name.partition("/")[0].removesuffix(SUFFIX) for name in self.manifest["sha256"]}

    def tensors(self, name: str) -> SavedTensors:
        """The tensors of ``model``, ``optimizer``, ``ema`` or ``average-N``. Raises
        CheckpointError."""
        return SavedTensors(self.path / name)


def load(path: Path, *, verify: bool = True) -> Checkpoint:
    """Read a checkpoint, by default with its checksums verified.

    Raises CheckpointError naming what is wrong with it.
    """
    manifest = read_mapping(path / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {manifest.get('format')!r}, this version reads {FORMAT}"
        )
    expected = manifest.get("sha256")
    if not isinstance(expected, dict) or not _is_complete(expected):
        raise CheckpointError(f"{path}: its manifest does not list all of its files")
    if manifest.pop("manifest_sha256", None) != digest(manifest):
        raise CheckpointError(f"{path / 'manifest.json'}: the file is damaged (its own sha256)")
    if verify:
        _verify(path, expected)
    try:
        open_file(path / "plugins.safetensors").close()
        plugins = load_file(path / "plugins.safetensors")
        profile = read_file(path / "profile.yaml", MAX_BYTES).decode("utf-8")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    try:
        state = RunState.from_json(read_mapping(path / "state.json"))
    except ValueError as error:
        raise CheckpointError(f"{path / 'state.json'}: {error}") from None
    found = Checkpoint(path, state, plugins, profile, in_present_words(manifest))
    _require_agreement(found)
    return found


def _require_agreement(found: Checkpoint) -> None:
    """Raise CheckpointError if parts of a checkpoint contradict one another."""
    path, step = found.path, found.state.step
    for where, value in (
        ("manifest.json", found.manifest.get("step")),
        ("its name", step_of(path) if IS_STEP.fullmatch(path.name) else step),
    ):
        if value != step or isinstance(value, bool):
            raise CheckpointError(f"{path}: {where} says step {value}, state.json says {step}")
    for key, texts in ROWS.items():
        rows = found.manifest.get(key, [])
        if not isinstance(rows, list) or not all(
            isinstance(row, dict) and all(isinstance(row.get(text), str) for text in texts)
            for row in rows
        ):
            raise CheckpointError(f"{path / 'manifest.json'}: {key} is not what a checkpoint holds")
    saved_profile(found.profile)
    missing = sorted(_references(found.state.plugins) - found.plugins.keys())
    if missing:
        raise CheckpointError(f"{path}: plugins.safetensors has no {missing[0]!r}")
    for name, listed in (found.state.tensors or {}).items():
        there = inventory(found.tensors(name).shapes)
        for tensor in sorted(listed.keys() | there.keys()):
            if listed.get(tensor) != there.get(tensor):
                raise CheckpointError(
                    f"{path / name}: tensor {tensor!r} is {_described(there.get(tensor))}, "
                    f"state.json says {_described(listed.get(tensor))}"
                )


def inventory(shapes: Mapping[str, tuple[Sequence[int], Any]]) -> dict[str, list[Any]]:
    """Type and shape of each tensor by name, as JSON values."""
    return {name: [str(dtype), *map(int, shape)] for name, (shape, dtype) in shapes.items()}


def _described(entry: Sequence[Any] | None) -> str:
    return "missing" if entry is None else f"{' '.join(map(str, entry[:1]))} {list(entry[1:])}"


def _references(value: Any) -> set[Any]:
    """The names of tensors that the state of plugins refers to."""
    names, rest = set(), [value]
    while rest:
        item = rest.pop()
        if isinstance(item, dict) and set(item) == {TENSOR_KEY}:
            names.add(str(item[TENSOR_KEY]))
        elif isinstance(item, dict | list):
            rest += item.values() if isinstance(item, dict) else item
    return names


def _verify(path: Path, expected: Mapping[str, str]) -> None:
    """Raise CheckpointError for a file that is missing, changed, or not listed."""
    present = {file.relative_to(path).as_posix() for file in _files(path)} - {"manifest.json"}
    for name in sorted(expected.keys() - present):
        raise CheckpointError(f"{path}: there is no file {name!r} in it")
    for stray in sorted(path.rglob(f"*{SUFFIX}")):
        if stray.relative_to(path).as_posix() not in expected:
            raise CheckpointError(f"{stray}: the manifest does not list it")
    for name in sorted(expected):
        try:
            actual = _sha256(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from None
        if actual != expected[name]:
            raise CheckpointError(f"{path / name}: the file is damaged (sha256 does not match)")
    read_evaluation(path)


def _is_complete(files: Mapping[str, str]) -> bool:
    """Whether a manifest lists all files, the tensors as a file or as a folder of shards."""
    parts = {name.partition("/")[0] for name in files}
    return {"plugins.safetensors", "state.json", "profile.yaml"} <= parts and all(
        name in parts or f"{name}{SUFFIX}" in parts for name in ("model", "optimizer")
    )


def newest_intact(root: Path) -> Checkpoint:
    """The newest checkpoint below ``root`` that verifies; says which were skipped and why.

    Raises CheckpointError when there is none.
    """
    reasons = []
    for path in reversed(list_checkpoints(root)):
        try:
            return load(path)
        except CheckpointError as error:
            reasons.append(str(error))
            log.warning("checkpoint skipped: %s", error)
    detail = "; ".join(reasons) or "there are none"
    raise CheckpointError(f"no intact checkpoint in {root}: {detail}")


def is_sound(path: Path) -> bool:
    """Whether the last step before the checkpoint at ``path`` was finite, and its loss on the
    held-out text if it was evaluated."""
    try:
        sound = read_mapping(path / "manifest.json").get("sound", True)
        evaluated = read_evaluation(path)
    except CheckpointError:
        return False
    return sound is True and (evaluated is None or isfinite(evaluated.loss))


def newest_sound(root: Path) -> Path | None:
    """The newest checkpoint below ``root`` that is sound; its files are not verified."""
    return next((path for path in reversed(list_checkpoints(root)) if is_sound(path)), None)


def prune(root: Path, keep_last: int, keep: Path | None = None) -> list[Path]:
    """Delete all but the newest, the newest ``keep_last`` that are sound (0: none is deleted), and
    ``keep``: checkpoints of non-finite steps do not count towards ``keep_last``. Returns the
    deleted ones."""
    deleted: list[Path] = []
    kept = 0
    for number, path in enumerate(reversed(list_checkpoints(root)) if keep_last else ()):
        if kept < keep_last and is_sound(path):
            kept += 1
        elif number > 0 and path != keep:
            shutil.rmtree(path, ignore_errors=True)
            deleted.append(path)
    return deleted


MAX_TENSOR_NAME = 200
"""The most characters of a tensor's path in a plugin's state, whose keys may be of any length."""


def split_tensors(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """A plugin's state, as :func:`~apt_core.plugin_state.plain_state` makes it, with each tensor
    moved into ``tensors``, under its place in the state, and a reference left there."""
    if isinstance(value, Tensor):
        name = f"{place}#{len(tensors)}"
        tensors[name] = value
        return {TENSOR_KEY: name}
    if isinstance(value, dict):
        return {k: split_tensors(v, _within(place, k), tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [split_tensors(v, _within(place, i), tensors) for i, v in enumerate(value)]
    return value


def _within(place: str, key: object) -> str:
    return f"{place}.{key}"[:MAX_TENSOR_NAME]


def join_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`split_tensors`."""
    if isinstance(value, dict):
        if set(value) == {TENSOR_KEY}:
            return tensors[value[TENSOR_KEY]]
        return {key: join_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [join_tensors(item, tensors) for item in value]
    return value


def _sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
