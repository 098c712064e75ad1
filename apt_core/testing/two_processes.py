"""Checks that a model trains in two processes as in one, with real processes on the CPU."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from apt_core.testing.tiny import TEXT, TINY_PROFILE

SHARDINGS = ("ddp", "fsdp")
STEPS = 3
SECONDS = 300.0
"""The time after which a run counts as deadlocked."""

ERROR = 1e-3
"""Relative tolerance of figures: sums in another order differ, increasingly over the steps."""

SETTINGS: dict[str, Any] = {
    "training": {"batch_size": 2, "log_every_steps": 1, "max_steps": STEPS, "learning_rate": 1e-4},
    "evaluation": {"eval_freq": 0, "sample_tokens": 0},
}


def differences(plugins: Sequence[str], overrides: Mapping[str, Any]) -> dict[str, str]:
    """The faults of a tiny run with ``plugins`` in two processes, by sharding; empty if it equals
    the run of one process over the same micro-batches."""
    with tempfile.TemporaryDirectory(prefix="apt-check-") as temporary:
        folder = Path(temporary)
        (folder / "text.txt").write_text(TEXT, encoding="utf-8")
        runs: dict[str, list[str]] = {"one": ["--training.grad_accum_steps", "2"]}
        for sharding in SHARDINGS:
            runs[sharding] = ["--nproc", "2", "--hardware.distributed", sharding]
        profile = folder / "tiny_run.yaml"
        profile.write_text(json.dumps(_profile(folder, overrides)), encoding="utf-8")
        options = [word for plugin in plugins for word in ("--plugin", plugin)]
        options += ["-p", str(profile), "--strict"]

        with ExitStack() as stack:
            ends = {
                name: stack.enter_context(
                    _running([*options, "--output", str(folder / name), *words])
                )
                for name, words in runs.items()
            }
            told = {name: end() for name, end in ends.items()}
        if told["one"]:
            return dict.fromkeys(SHARDINGS, f"a run of one process fails: {told['one']}")
        return {
            name: told[name] or next(_compared(folder / "one", folder / name), "")
            for name in SHARDINGS
        }


def _profile(folder: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    data = copy.deepcopy(TINY_PROFILE)
    for section, values in SETTINGS.items():
        data[section] |= values
    data["data"] = {"train_path": str(folder / "text.txt")}
    for key, value in overrides.items():
        *path, last = key.split(".")
        place = data
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return data


@contextmanager
def _running(arguments: Sequence[str]) -> Iterator[Callable[[], str]]:
    """Runs apt-train meanwhile. What is yielded waits for its end, and returns its error or an
    empty string."""
    from apt_core.parallel.child_process import apt_train_command

    with (
        tempfile.TemporaryFile("w+", errors="replace") as output,
        subprocess.Popen(
            apt_train_command(arguments), stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):

        def end() -> str:
            try:
                code = process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                return f"it has not ended after {SECONDS:.0f} seconds"
            if code == 0:
                return ""
            output.seek(0)
            lines = output.read().splitlines()
            errors = [line for line in lines if line.startswith("error: ")]
            return (errors or lines or [f"exit code {code}"])[-1].removeprefix("error: ")

        try:
            yield end
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _compared(one: Path, two: Path) -> Iterator[str]:
    """Every difference between two runs: figures of steps, then tensors at the end."""
    for expected, given in zip(_rows(one), _rows(two), strict=True):
        for name in ("loss", "grad_norm", *(n for n in expected if n.startswith("loss/"))):
            a, b = float(expected[name]), float(given.get(name, "nan"))
            if not math.isclose(a, b, rel_tol=ERROR, abs_tol=1e-5):
                yield (
                    f"{name} of step {expected['step']} is {b:.6g}, and {a:.6g} in one process of "
                    "the same micro-batches"
                )
    wanted, found = _tensors(one), _tensors(two)
    for name, tensor in wanted.items():
        off = (found[name].double() - tensor.double()).abs().max().item() if tensor.numel() else 0.0
        # AdamW takes full steps even for gradients that are only rounding errors.
        bound = 4 * STEPS * SETTINGS["training"]["learning_rate"]
        if not off <= bound + ERROR * tensor.double().abs().max().item():
            yield f"{name} differs by {off:.3g} from that of one process after {STEPS} steps"


def _rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def _tensors(folder: Path) -> dict[str, Any]:
    import torch

    from apt_core.runs import checkpoint

    saved = checkpoint.load(checkpoint.list_checkpoints(folder / "checkpoints")[-1])
    tensors = {
        name: torch.empty(size, dtype=dtype)
        for name, (size, dtype) in saved.tensors("model").shapes.items()
    }
    saved.tensors("model").read_into(tensors, "weights")
    return tensors
