"""Helpers for tests that train: a tiny profile on disk and apt-train in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from apt_core.cli.run_command import run_command
from apt_core.cli.train import app
from apt_core.testing import TINY_PROFILE
from apt_core.testing.tiny import TEXT


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, and test processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class CliRun:
    """What one call of apt-train did."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-*"))

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.checkpoints[-1] / "model.safetensors")

    def same_weights(self, other: CliRun) -> bool:
        """Are the weights of the last checkpoints bit-identical?"""
        own, others = self.weights(), other.weights()
        return own.keys() == others.keys() and all(
            tensor.equal(others[name]) for name, tensor in own.items()
        )


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A tiny profile beside its text."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    path = tmp_path / "tiny.yaml"
    path.write_text(
        yaml.safe_dump({**TINY_PROFILE, "data": {"train_path": str(text)}}), encoding="utf-8"
    )
    return path


@pytest.fixture
def apt_train(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., CliRun]:
    """Call apt-train on the tiny profile; ``name`` is the run's folder."""

    def call(*arguments: str, name: str = "run") -> CliRun:
        folder = tmp_path / name
        code = run_command(
            app, "apt-train", ["-p", str(profile), "--output", str(folder), *arguments]
        )
        captured = capsys.readouterr()
        return CliRun(code, captured.out, captured.err, folder)

    return call
