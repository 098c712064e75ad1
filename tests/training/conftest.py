"""Helpers for tests that train: a tiny profile on disk and apt-train in this process."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from apt_core import hookimpl
from apt_core.cli.run_command import run_command
from apt_core.cli.train import app
from apt_core.runs.compare import compare_runs
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
    """Call apt-train on the tiny profile, or ``of`` another; ``name`` is the run's folder."""

    def call(*arguments: str, name: str = "run", of: str | Path = profile) -> CliRun:
        folder = tmp_path / name
        code = run_command(app, "apt-train", ["-p", str(of), "--output", str(folder), *arguments])
        captured = capsys.readouterr()
        return CliRun(code, captured.out, captured.err, folder)

    return call


@pytest.fixture
def in_children(late_imports: None) -> Callable[..., list[int]]:
    """Call each function in a forked process of its own, all at once; returns their exit codes,
    negative for a signal.

    A process that is to be killed costs no start of an interpreter this way.
    """

    def start(function: Callable[[], object]) -> int:
        with warnings.catch_warnings():
            # With one thread, torch has none that a fork could lose.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child:
            return child
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)

    def call(*functions: Callable[[], object]) -> list[int]:
        children = [start(function) for function in functions]
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    return call


@pytest.fixture
def differences() -> Callable[[Path, Path], list[str]]:
    """What differs between the last checkpoints and the rows of two runs' folders, except what is
    measured on a clock."""
    return lambda one, other: [each.what for each in compare_runs(one, other).differences]


class Killer:
    """Kills its own process in a micro-batch of the step after step ``n``, when the checkpoint of
    step ``saved`` is there."""

    def __init__(self, n: int, *, micro: int = 2, saved: int | None = None) -> None:
        self.n, self.micro, self.saved = n, micro, n if saved is None else saved
        self.seen = 0

    @hookimpl
    def apt_loss_terms(self, trainer: Any) -> dict[str, Any]:
        self.seen += trainer.step == self.n
        if self.seen == self.micro:
            folder = trainer.output_dir / "checkpoints" / f"step-{self.saved:08d}"
            while not folder.exists():
                time.sleep(0.002)
            os.kill(os.getpid(), signal.SIGKILL)
        return {}


@pytest.fixture
def killer() -> type[Killer]:
    """A plugin that kills the run."""
    return Killer


def _ranks(train: Callable[[], object], processes: int = 2) -> list[Callable[[], None]]:
    """``train`` as each of the processes of one run calls it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def rank(number: str) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ.update(WORLD_SIZE=str(processes), RANK=number, LOCAL_RANK=number)
        train()

    return [partial(rank, str(number)) for number in range(processes)]


@pytest.fixture
def ranks() -> Callable[..., list[Callable[[], None]]]:
    """For ``in_children``: a run in two processes, or as many as asked."""
    return _ranks


@pytest.fixture
def vouch() -> Callable[[Path, dict[str, str]], None]:
    """Change sha256 sums in a checkpoint's manifest, as one would who knows how it is made."""

    def change(folder: Path, files: dict[str, str]) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        del manifest["manifest_sha256"]
        manifest["sha256"].update(files)
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({**manifest, "manifest_sha256": digest}), encoding="utf-8")

    return change


@pytest.fixture
def seal(vouch: Callable[[Path, dict[str, str]], None]) -> Callable[[Path], None]:
    """Make the checksums of a checkpoint those of its files."""

    def change(folder: Path) -> None:
        names = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["sha256"]
        vouch(folder, {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names})

    return change
