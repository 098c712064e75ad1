"""Does a run that is killed and resumed give the same bits as one that is not?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apt_core.errors import TrainingError
from apt_core.training import checkpoint
from apt_core.training.checkpoint import Checkpoint

VOLATILE = ("tokens_per_s", "mfu", "memory_mb", "time/")
"""Beginnings of the names of figures that are of the machine, not of the training."""

POLL_SECONDS = 0.01
TAIL = 20
"""Lines of a failed run's output that are shown."""


@dataclass(frozen=True)
class Verdict:
    """What was compared, and every difference. ``notes`` are differences of plugins' own metrics,
    which need not be functions of the training."""

    compared: list[str]
    differences: list[str]
    notes: list[str]


def verify_resume(arguments: Sequence[str], folder: Path, steps: int) -> Verdict:
    """Train ``steps`` steps in one go; train again, be killed by SIGKILL after half of them, resume
    and go on; compare.

    ``arguments`` are those of apt-train; ``folder`` is empty. Raises TrainingError for a run that
    fails.
    """
    every = ("training.log_every_steps=1", "training.keep_last=0", "evaluation.sample_tokens=0")
    settings = [word for setting in every for word in ("--set", setting)]
    command = [sys.executable, "-m", "apt_core", "train", *arguments, *settings]
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
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        while not appears.exists():
            if process.poll() is not None:
                assert process.stdout is not None
                raise TrainingError(_failed(process.returncode, process.stdout.read()))
            time.sleep(POLL_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)


def _failed(code: int, output: str) -> str:
    tail = "\n".join(output.splitlines()[-TAIL:])
    return f"a run of the comparison ended with exit code {code}:\n{tail}"


def _compare(whole: Path, killed: Path, half: int, steps: int) -> Verdict:
    name = f"checkpoints/{checkpoint.folder_name(steps)}"
    expected, actual = checkpoint.load(whole / name), checkpoint.load(killed / name)
    compared, differences = [], []
    for kind in ("model", "optimizer", "ema"):
        if (expected.path / f"{kind}.safetensors").exists() or (expected.path / kind).is_dir():
            tensors, different = _compare_tensors(kind, expected, actual)
            compared.append(f"{tensors} tensors of {kind}")
            differences += different
    if expected.state["plugins"] != actual.state["plugins"]:
        differences.append("the state of plugins")
    rows, row_differences, notes = _compare_rows(whole, killed, half, steps)
    compared.append(f"{rows} rows of metrics after step {half}")
    return Verdict(compared, differences + row_differences, notes)


def _compare_tensors(kind: str, expected: Checkpoint, actual: Checkpoint) -> tuple[int, list[str]]:
    pairs = [_read(checkpoint_.tensors(kind)) for checkpoint_ in (expected, actual)]
    names = pairs[0].keys() | pairs[1].keys()
    different = [
        f"{kind}: {name}"
        for name in sorted(names)
        if name not in pairs[0]
        or name not in pairs[1]
        or not torch.equal(
            pairs[0][name].view(-1).view(torch.uint8), pairs[1][name].view(-1).view(torch.uint8)
        )
    ]
    return len(names), different


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
    return len(expected), sorted(differences), sorted(notes)


def _rows(folder: Path, half: int, steps: int) -> Iterator[tuple[tuple[int, str], dict[str, Any]]]:
    """The rows of steps after ``half``, by step and by whether they are of an evaluation; the whole
    evaluation that ends each part of a run is left out."""
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if half < row["step"] <= steps:
            kind = "evaluation" if "loss" not in row else "training"
            if kind == "training" or row["step"] < steps:
                yield (row["step"], kind), row
