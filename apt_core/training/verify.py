"""Does a run that is killed and resumed give the same bits as one that is not?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apt_core.errors import TrainingError
from apt_core.parallel.child_process import apt_train_command
from apt_core.runs import checkpoint
from apt_core.runs.checkpoint import Checkpoint

VOLATILE = ("tokens_per_s", "mfu", "memory_mb", "time/")
"""Beginnings of the names of figures that are of the machine, not of the training."""

UNCOMPARED = {"metrics", "plugin_records", "spent"}
"""Parts of a checkpoint's state: the newest row, which is compared as a row, the tracebacks of
plugins, and time."""

POLL_SECONDS = 0.01
TAIL = 20
"""Lines of a failed run's output that are shown."""


@dataclass(frozen=True)
class Verdict:
    """What was compared, and every difference. ``notes`` tell of plugins that failed, of what was
    not compared, and of differences of plugins' own metrics, which need not be functions of the
    training."""

    compared: list[str]
    differences: list[str]
    notes: list[str]


def verify_resume(
    arguments: Sequence[str], folder: Path, steps: int, *, deterministic: bool
) -> Verdict:
    """Train ``steps`` steps in one go; train again, be killed by SIGKILL after half of them, resume
    and go on; compare.

    ``arguments`` are those of apt-train; ``folder`` is empty. ``deterministic`` asks for such
    kernels, where others give other bits each time. Raises TrainingError for a run that fails.
    """
    every = ["training.log_every_steps=1", "training.keep_last=0", "evaluation.sample_tokens=0"]
    if deterministic:
        every.append("training.deterministic=true")
    settings = [word for setting in every for word in ("--set", setting)]
    command = apt_train_command([*arguments, *settings])
    until = ["--stop-at-step", str(steps)]
    whole, killed = folder / "in_one_go", folder / "killed_and_resumed"
    _run([*command, "--output", str(whole), *until])
    # A short profile ends before.
    steps = checkpoint.load(checkpoint.list_checkpoints(whole / "checkpoints")[-1]).state["step"]
    half = max(1, steps // 2)
    saving = ["--set", f"training.save_every_steps={half}"]
    at = killed / "checkpoints" / checkpoint.folder_name(half)
    _run_until([*command, "--output", str(killed), *saving], at)
    _run([*command, "--output", str(killed), "--resume-from", str(at), *until])
    return _compare(whole, killed, half, steps)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise TrainingError(_failed(done.returncode, done.stdout + done.stderr))


def _run_until(command: Sequence[str], appears: Path) -> None:
    """Run until ``appears`` is there, and then kill every process of it."""
    with (
        tempfile.TemporaryFile("w+", errors="replace") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        try:
            while not appears.exists():
                if process.poll() is not None:
                    output.seek(0)
                    raise TrainingError(_failed(process.returncode, output.read()))
                time.sleep(POLL_SECONDS)
        finally:
            for pid in [*_descendants(process.pid), process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> Iterator[int]:
    """The processes that ``pid`` has started, and those that these have: those of --nproc are in
    sessions of their own. The innermost first."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The command's name, in parentheses, may hold anything.
            parent = path.read_text(errors="replace").rpartition(")")[2].split()[1]
            if int(parent) == pid:
                child = int(path.parent.name)
                yield from _descendants(child)
                yield child


def _failed(code: int, output: str) -> str:
    tail = "\n".join(output.splitlines()[-TAIL:])
    return f"a run of the comparison ended with exit code {code}:\n{tail}"


def _compare(whole: Path, killed: Path, half: int, steps: int) -> Verdict:
    name = f"checkpoints/{checkpoint.folder_name(steps)}"
    expected, actual = checkpoint.load(whole / name), checkpoint.load(killed / name)
    compared, differences = compare_checkpoints(expected, actual)
    rows, row_differences, notes = _compare_rows(whole, killed, half, steps)
    records = expected.state["plugin_records"].items()
    waiting = sorted(name for name, record in records if record["state"] == "dormant")
    if waiting:
        notes.append(
            f"nothing was compared of {', '.join(waiting)}, not enabled after {steps} steps: "
            "bring the schedule forward (schedules.enable_…_at_step) to try a resume with it"
        )
    notes = _failures({"in one go": expected, "resumed": actual}) + notes
    compared += ["the rest of the state", f"{rows} rows of metrics after step {half}"]
    return Verdict(compared, sorted(differences) + row_differences, notes)


def compare_checkpoints(expected: Checkpoint, actual: Checkpoint) -> tuple[list[str], list[str]]:
    """What was compared of two checkpoints, and every difference between them: all tensors by their
    bytes, and all of the state but what is of the machine."""
    compared: list[str] = []
    differences: list[str] = []
    averages = [f"average-{index}" for index in range(len(expected.state["averages"]))]
    for kind in ("model", "optimizer", "ema", *averages, "plugins"):
        pair = [_tensors(kind, found) for found in (expected, actual)]
        if pair[0] or pair[1]:
            compared.append(f"{len(pair[0])} tensors of {kind}")
            differences += [f"{kind}: {name}" for name in _unequal(*pair)]
    for part in expected.state.keys() - UNCOMPARED:
        values = [found.state[part] for found in (expected, actual)]
        if part == "plugins":
            differences += [f"the state of plugin {name}" for name in _different(*values)]
        elif _text(values[0]) != _text(values[1]):
            differences.append(f"the state: {part}")
    return compared, differences


def _failures(found: Mapping[str, Checkpoint]) -> list[str]:
    """What failed of each plugin, and in which of the runs."""
    runs_of: dict[str, list[str]] = {}
    for run, saved in found.items():
        for name, record in saved.state["plugin_records"].items():
            # One failure stands for those after it, which a quarantine cuts short.
            for failure in record["failures"][:1]:
                place = f" at {failure['where']}" if failure["where"] else ""
                text = (
                    f"plugin {name} is {record['state']}: it failed in {failure['hook']}{place}: "
                    f"{failure['error']}"
                )
                runs_of.setdefault(text, []).append(run)
    return [
        f"{text} ({' and '.join(runs)}); what it did not do was not compared"
        for text, runs in sorted(runs_of.items())
    ]


def _tensors(kind: str, found: Checkpoint) -> Mapping[str, torch.Tensor]:
    if kind == "plugins":
        return found.plugins
    if (found.path / f"{kind}.safetensors").exists() or (found.path / kind).is_dir():
        return _read(found.tensors(kind))
    return {}


def _unequal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors that do not have the same bytes, or are only in one."""
    shared = one.keys() & other.keys()
    return [
        *(one.keys() ^ other.keys()),
        *(
            name
            for name in shared
            if one[name].dtype != other[name].dtype
            or not torch.equal(
                one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)
            )
        ),
    ]


def _different(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [n for n in one.keys() | other.keys() if _text(one.get(n)) != _text(other.get(n))]


def _text(value: Any) -> str:
    """As JSON: a NaN is itself there."""
    return json.dumps(value, sort_keys=True)


def _read(saved: Any) -> dict[str, torch.Tensor]:
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in saved.shapes.items()}
    saved.read_into(tensors, "tensors")
    return tensors


def _compare_rows(
    whole: Path, killed: Path, half: int, steps: int
) -> tuple[int, list[str], list[str]]:
    expected, actual = (dict(_rows(folder, half, steps)) for folder in (whole, killed))
    differences: list[str] = []
    notes: list[str] = []
    for key in expected.keys() | actual.keys():
        step = key[0]
        one, other = expected.get(key, {}), actual.get(key, {})
        for name in sorted(one.keys() | other.keys()):
            if name.startswith(VOLATILE) or one.get(name) == other.get(name):
                continue
            text = f"{name} after step {step}: {one.get(name)} in one go, {other.get(name)} resumed"
            foreign = "/" in name and not name.startswith(("loss/", "schedule/"))
            (notes if foreign else differences).append(text)
    told = [f"a metric of a plugin differs: {text}" for text in sorted(notes)]
    return len(expected), sorted(differences), told


def _rows(folder: Path, half: int, steps: int) -> Iterator[tuple[tuple[int, str], dict[str, Any]]]:
    """The rows of steps after ``half``, by step and by whether they are of an evaluation; the whole
    evaluation that ends each part of a run is left out."""
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        if half < row["step"] <= steps:
            kind = "evaluation" if "loss" not in row else "training"
            if kind == "training" or row["step"] < steps:
                yield (row["step"], kind), row
