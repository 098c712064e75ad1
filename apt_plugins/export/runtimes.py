"""Runs exports in the programs that they are for, each in a fresh process without APT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from apt_core import AptError
from apt_core.held_folders import held_folder
from apt_core.json_files import parse_json
from apt_core.providers import Proof
from apt_plugins.export.questions import Questions

TOLD = 15
"""Lines of a failed process that are told."""


class RuntimeFailed(AptError):
    """The program that an export is for could not run it."""


@dataclass(frozen=True, eq=False)
class ForeignAnswers:
    """What a runtime has answered. ``text_ids``, ``conversation_ids`` and ``ends`` are None, as a
    whole or one by one, where the runtime has nothing of the kind. With ``few_ends`` it can be told
    of one end of a text and one of a turn alone, and knows others by their names. ``also`` has the
    tokens of other ways to run the export, by name."""

    versions: dict[str, str]
    tokens: list[list[int]]
    text_ids: list[list[int] | None] | None
    conversation_ids: list[list[int] | None] | None
    ends: list[int] | None
    few_ends: bool
    also: dict[str, list[list[int]]]
    arrays: Any

    def ways(self) -> dict[str, list[list[int]]]:
        """The tokens of each way to run the export, by name; the first one has none."""
        return {"": self.tokens, **self.also}

    def logits(self, prompt: int, way: str = "") -> npt.NDArray[Any]:
        """Of all places of a prompt [T, V], or of the last one [1, V]."""
        found: npt.NDArray[Any] = self.arrays[_name(way, f"logits.{prompt}")]
        return found

    def stream(self, prompt: int, block: int, way: str = "") -> npt.NDArray[Any] | None:
        """The stream [T, D] after a block; None where the runtime does not show it."""
        name = _name(way, f"stream.{prompt}.{block}")
        found: npt.NDArray[Any] | None = self.arrays.get(name)
        return found


def _name(way: str, array: str) -> str:
    return f"{way}:{array}" if way else array


Tell = Callable[[str], None]


@contextmanager
def answered(
    proof: Proof,
    targets: Sequence[tuple[Path, Questions]],
    tell: Tell = lambda what: None,
    *,
    threads: int | None = None,
) -> Any:
    """What the runtime of ``proof`` answers of each export; one process runs them all, with so many
    ``threads``, by default those of torch here. Their arrays can be read while the context lasts.

    Raises RuntimeFailed where the process fails.
    """
    temporary = Path(tempfile.gettempdir())
    with held_folder(temporary, "apt-export-*", private=True) as place:
        folders = [place / str(number) for number in range(len(targets))]
        for folder, (target, questions) in zip(folders, targets, strict=True):
            folder.mkdir()
            request = {
                "target": str(target.resolve()),
                "settings": dict(proof.settings),
                "output": str(folder),
                **asdict(questions),
            }
            (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        requests = [folder / "request.json" for folder in folders]
        _run(proof, requests, place, tell, threads or torch.get_num_threads())
        yield [_read(folder, proof) for folder in folders]


def _run(proof: Proof, requests: Sequence[Path], folder: Path, tell: Tell, threads: int) -> None:
    command = [sys.executable, "-I", str(proof.script), *map(str, requests)]
    options: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "cwd": folder,
        # Threads that wait for each other would keep the CPU from those that they wait for.
        "env": {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"},
    }
    errors = folder / "stderr.txt"
    with (
        errors.open("wb") as stderr,
        subprocess.Popen(command, stderr=stderr, **options) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                tell(f"{proof.runtime}: {_step(line)}")
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if code:
        said = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
        what = "\n".join(said[-TOLD:]) or "it said nothing"
        raise RuntimeFailed(f"{proof.runtime} could not run the export ({ended}):\n{what}")


def _step(line: bytes) -> str:
    try:
        _, what = json.loads(line)
    except ValueError:
        return line.decode("utf-8", errors="replace").strip()
    return str(what)


def _read(folder: Path, proof: Proof) -> ForeignAnswers:
    try:
        found = parse_json((folder / "answers.json").read_text(encoding="utf-8"))
        arrays = np.load(folder / "outputs.npz", allow_pickle=False)
        return ForeignAnswers(arrays=arrays, **found)
    except (OSError, ValueError, TypeError) as error:
        raise RuntimeFailed(f"the answers of {proof.runtime} cannot be read: {error}") from error
