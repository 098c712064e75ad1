"""Two processes with a GPU each: what they compute, and what is left where one is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from apt_core.runs.checkpoint import newest_intact
from apt_core.runs.tensor_files import SavedTensors
from apt_core.testing import TINY_PROFILE
from apt_core.testing.tiny import TEXT

GPU = "cuda"
SECONDS = 180
"""Far below the half hour for which processes wait for one that is alive."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        GPU == "cuda" and torch.cuda.device_count() < 2, reason="no two CUDA devices here"
    ),
]

KILLED = """
import os, signal
from apt_core import hookimpl

@hookimpl
def apt_loss_terms(trainer):
    if (trainer.rank, trainer.step) == (1, 5):  # in the sixth
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def train(tmp_path: Path) -> Any:
    """Train in ``processes``, into the folder ``name``."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    training = {**TINY_PROFILE["training"], "max_steps": 8, "keep_last": 0}
    profile = {
        **TINY_PROFILE,
        "data": {"train_path": str(tmp_path / "text.txt")},
        "training": {**training, "log_every_steps": 4},
        "hardware": {"device": GPU},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(profile))

    def run(name: str, processes: int, *words: str) -> Any:
        command = [sys.executable, "-m", "apt_core", "train", "-p", str(tmp_path / "tiny.yaml")]
        command += ["--nproc", str(processes), "--output", str(tmp_path / name)]
        command += ["--training.grad_accum_steps", str(2 // processes), *words]
        return subprocess.run(
            command, env=os.environ, capture_output=True, text=True, timeout=SECONDS
        )

    return run


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row[name] for row in rows for name in ("loss", "val_loss") if name in row]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    saved = SavedTensors(checkpoint / "model")
    targets = {name: torch.zeros(size, dtype=kind) for name, (size, kind) in saved.shapes.items()}
    saved.read_into(targets, "model")
    return targets


@pytest.mark.parametrize(("precision", "tolerance"), [(False, 1e-4), (True, 2e-2)])
def test_two_gpus_train_as_one_does(
    train: Any, tmp_path: Path, precision: bool, tolerance: float
) -> None:
    how = f"--training.mixed_precision={str(precision).lower()}"
    for name, processes, sharding in (("one", 1, "ddp"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")):
        done = train(name, processes, how, "--hardware.distributed", sharding)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "FSDP2 gathers the layers in fp32" not in done.stdout
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=tolerance)
        saved = weights(newest_intact(tmp_path / name / "checkpoints").path)
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_process_that_is_killed_ends_the_run(train: Any, tmp_path: Path, sharding: str) -> None:
    (tmp_path / "killed.py").write_text(KILLED, encoding="utf-8")
    words = ["--hardware.distributed", sharding, "--training.mixed_precision=false"]
    saving = ["--training.save_every_steps", "3"] if sharding == "fsdp" else []
    done = train("run", 2, *words, *saving, "--plugin", str(tmp_path / "killed.py"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: process 1 was killed by signal 9" in done.stderr
    assert "error: another process of the run has ended" in done.stderr
    checkpoint = newest_intact(tmp_path / "run" / "checkpoints")
    step = checkpoint.state.step
    if sharding == "fsdp":
        assert step == 3  # the rest of the model went with its process
        return
    assert step in (4, 5)  # of the fifth the GPU may not have been done
    done = train("whole", 2, *words, f"--stop-at-step={step}")
    assert done.returncode == 0, done.stdout + done.stderr
    whole = newest_intact(tmp_path / "whole" / "checkpoints")
    for key in ("step", "tokens", "epoch", "nonfinite_steps"):
        assert getattr(checkpoint.state, key) == getattr(whole.state, key), key
    torch.testing.assert_close(weights(checkpoint.path), weights(whole.path), rtol=1e-4, atol=1e-6)
