"""Damage in the folder of a run: what is harmless ends no resume, what is not is told, and a
checkpoint with the right checksums is still looked at."""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apt_core import hookimpl
from apt_core.errors import AptError, CheckpointError
from apt_core.runs import checkpoint
from apt_core.runs.run_state import ALWAYS, RunState
from apt_core.testing import TinyRun, tiny_run

Seal = Callable[[Path], None]

OVERRIDES = {"training.save_every_steps": 2, "training.log_every_steps": 1}

ROWS = [
    b"[]", b"null", b'{"step": null}', b'{"step": "3"}', b'{"step": true}', b"17", b'"text"',
    b'{"step": 1e999}', b'{"step": NaN}', b"[" * 100_000, b'{"a":' * 5_000, b"\x00\x00",
    b"\xff\xfe", b'{"step": 1', b"", b"   ", b'{"step": ' + b"9" * 5_000 + b"}",
]  # fmt: skip
MANIFESTS: dict[str, bytes] = {
    "nested": b"[" * 100_000,
    "deep": b'{"a":' * 5_000,
    "list": b"[]",
    "null": b"null",
    "bytes": b"\xff\xfe\x00",
    "cut": b'{"status": "run',
    "other types": b'{"checkpoint_dir": 5, "failed_checkpoints": 7, "figures": [], "sample": {}}',
    "numbers": b'{"figures": {"seconds": "x", "steps": [], "tokens_per_s": 1e999}, "started": 1}',
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run of six steps in one go."""
    return tiny_run(overrides=OVERRIDES, steps=6, output=tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one that was stopped after four."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    tiny_run(overrides=OVERRIDES, steps=6, output=folder, stop_at_step=4)
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    shutil.copy(stopped.with_name("run.txt"), tmp_path / "run.txt")
    return shutil.copytree(stopped, tmp_path / "run")


def resume(folder: Path, **options: Any) -> TinyRun:
    return tiny_run(overrides=OVERRIDES, steps=6, output=folder, resume=True, **options)


def steps_of(found: TinyRun) -> list[int]:
    return [row["step"] for row in found.metrics if "loss" in row]


def test_rows_that_are_none_cost_no_resume(
    run: Path, whole: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = run / "metrics.jsonl"
    good = metrics.read_bytes().splitlines()
    assert len(good) >= 4
    metrics.write_bytes(b"\n".join([*good[:2], *ROWS, *good[2:], *ROWS[:5]]))
    again = resume(run)
    assert again.same_weights(whole) and steps_of(again) == [1, 2, 3, 4, 5, 6]
    assert "lines that are no rows of steps are left out" in caplog.text


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_is_none_costs_no_resume(run: Path, whole: TinyRun, name: str) -> None:
    (run / "manifest.json").write_bytes(MANIFESTS[name])
    again = resume(run)
    assert again.same_weights(whole) and again.manifest["status"] == "finished"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def outside(path: Path) -> None:
    target = path.parent.parent / "outside.txt"
    target.write_text("mine\n")
    path.symlink_to(target)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(path.parent)  # its path may be longer than a socket's may
        bound.bind(path.name)
        os.chdir(here)


@pytest.mark.parametrize("names", [("manifest.json", "log.txt"), ("metrics.jsonl", "profile.yaml")])
@pytest.mark.parametrize("put", [pipe, folder, dangling, outside, a_socket])
def test_what_is_no_file_is_neither_waited_for_nor_followed(
    run: Path, whole: TinyRun, names: tuple[str, str], put: Callable[[Path], None]
) -> None:
    for name in names:
        (run / name).unlink()
        put(run / name)
    again = resume(run)
    assert again.result.status == "finished" and again.same_weights(whole)
    target = run.parent / "outside.txt"
    assert not target.exists() or target.read_text() == "mine\n"
    assert not (run / "nothing").exists()


@pytest.mark.parametrize("put", [pipe, folder, dangling, a_socket])
def test_the_checkpoint_before_one_that_lacks_a_file_is_used(
    run: Path, whole: TinyRun, put: Callable[[Path], None]
) -> None:
    newest = run / "checkpoints" / "step-00000004"
    for name in ("state.json", "manifest.json", "profile.yaml", "model.safetensors"):
        kept = (newest / name).rename(run / "kept")
        put(newest / name)
        assert loaded_step(run / "checkpoints") == 2, name
        if name != "model.safetensors":
            (newest / name).rename(run / f"put-{name}")
            kept.rename(newest / name)
    assert resume(run).same_weights(whole)


def test_a_folder_that_takes_nothing_ends_no_resume(
    run: Path, whole: TinyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that is full while the run is taken up again; there is room before its end."""
    replace, full = os.replace, [True]

    def fails(source: Any, target: Any) -> None:
        if full[0] and Path(target).parent == run:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    class Freeing:
        @hookimpl
        def on_step_end(self, step: int) -> None:
            full[0] = step < 6

    monkeypatch.setattr(os, "replace", fails)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n')
    again = tiny_run(Freeing(), overrides=OVERRIDES, steps=6, output=run, resume=True)
    assert again.same_weights(whole) and steps_of(again) == [1, 2, 3, 4, 5, 6]
    assert "rows of steps to come are still in it" in caplog.text


def test_rows_and_lines_go_on_after_their_file_is_taken_away(tmp_path: Path) -> None:
    class Rotating:
        @hookimpl
        def on_step_end(self, step: int, trainer: Any) -> None:
            if step == 3:
                (trainer.output_dir / "metrics.jsonl").unlink()
                (trainer.output_dir / "log.txt").rename(trainer.output_dir / "log.1")

    found = tiny_run(Rotating(), overrides=OVERRIDES, steps=6, output=tmp_path / "run")
    assert steps_of(found) == [3, 4, 5, 6]
    assert "step-00000006" in (tmp_path / "run" / "log.txt").read_text()


# Sealed, and wrong ------------------------------------------------------------------------------


WRONG = (None, True, -1, 1e999, "text", [], {}, [[]], 2**70, {"a": {"b": 1}})
FREE = ("plugins.", "metrics.", "scores.", "start_scores.", "spent.", "tensors.")


def leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*at, key))


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    made = copy.deepcopy(value)
    inner = made
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = new
    return made


def loaded_step(root: Path) -> int | None:
    """The step of the checkpoint that would be gone on from; None where there is none."""
    try:
        found = checkpoint.newest_intact(root)
    except CheckpointError:
        return None
    return found.state.step


def refused(state: dict[str, Any]) -> str:
    """Why this is no state of a run; empty where it is one."""
    try:
        RunState.from_json(state)
    except ValueError as error:
        return str(error)
    return ""


def test_each_value_of_a_state_is_of_its_type(seal: Seal, run: Path) -> None:
    root = run / "checkpoints"
    newest = root / "step-00000004"
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    tried, may_be_null = 0, ("tokens_sha256", "windows", "tensors", "stopping.reference")
    for at in leaves(state):
        where = ".".join(map(str, at))
        kind = type(_at(state, at))
        for new in WRONG:
            same = type(new) is kind or (kind is float and isinstance(new, int | float))
            if same or where.startswith(FREE) or "plan" in at or "settings" in at:
                continue
            if new is None and where in may_be_null:
                continue
            if where == "stopping.reference" and isinstance(new, int):
                continue  # a loss may be any number
            tried += 1
            wrong = changed(state, at, new)
            assert refused(wrong), (where, new)
            if tried % 40 == 0:
                (newest / "state.json").write_text(json.dumps(wrong))
                seal(newest)
                assert loaded_step(root) == 2, (where, new)
    assert tried > 200
    for key in ALWAYS:
        assert refused({k: state[k] for k in state if k != key}), key
    assert refused({**state, "surprise": 1}) and not refused(state)
    assert RunState.from_json(state).to_json() == state


def _at(value: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        value = value[key]
    return value


def renamed(tensors: dict[str, Any]) -> None:
    tensors["surprise"] = tensors.pop(next(iter(tensors)))


def taken(tensors: dict[str, Any]) -> None:
    del tensors[next(iter(tensors))]


def cast(dtype: torch.dtype) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        name = next(iter(tensors))
        tensors[name] = tensors[name].to(dtype)

    return change


def cut(tensors: dict[str, Any]) -> None:
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name] = tensors[name][:-1].clone()


CHANGES = (renamed, taken, cast(torch.int64), cast(torch.float16), cast(torch.float64), cut)


@pytest.mark.parametrize("file", ["model", "optimizer"])
@pytest.mark.parametrize("told", [True, False])
def test_tensors_are_those_of_the_run(seal: Seal, run: Path, file: str, told: bool) -> None:
    """Where the state tells of the change too, there is an error in place of other weights."""
    root = run / "checkpoints"
    newest = root / "step-00000004"
    original = shutil.copytree(newest, run.parent / "original")
    for change in CHANGES:
        shutil.rmtree(newest)
        shutil.copytree(original, newest)
        path = newest / f"{file}.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        if told:
            state = json.loads((newest / "state.json").read_text())
            shapes = {name: (t.shape, t.dtype) for name, t in tensors.items()}
            state["tensors"][file] = checkpoint.inventory(shapes)
            (newest / "state.json").write_text(json.dumps(state))
        seal(newest)
        if told:
            with pytest.raises(AptError):
                resume(run)
        else:
            assert loaded_step(root) == 2


@pytest.mark.parametrize("step", [3, 40, -4, "4", None, True])
def test_a_step_that_contradicts_its_checkpoint_is_noticed(
    seal: Seal, run: Path, step: Any
) -> None:
    newest = run / "checkpoints" / "step-00000004"
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps({**manifest, "step": step}))
    seal(newest)
    assert loaded_step(run / "checkpoints") == 2
    if isinstance(step, int) and step > 4:
        newest.rename(newest.with_name(f"step-{step:08d}"))
        assert loaded_step(run / "checkpoints") == 2


def test_a_bomb_of_aliases_in_a_profile_is_not_unfolded(
    seal: Seal, run: Path, whole: TinyRun
) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    )
    newest = run / "checkpoints" / "step-00000004"
    (newest / "profile.yaml").write_text(bomb)
    seal(newest)
    assert resume(run).same_weights(whole)
