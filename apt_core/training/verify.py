"""Checks that a run that is killed and resumed gives the same bits as an uninterrupted one."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from apt_core.errors import TrainingError
from apt_core.parallel.child_process import apt_train_command
from apt_core.runs import checkpoint
from apt_core.runs.checkpoint import Checkpoint
from apt_core.runs.checkpoint_parts import listed
from apt_core.runs.compare import compare_runs
from apt_core.training.curriculum.model_modes import PARAMETER

RECORDS = "the state: plugin_records"
"""Differs by the texts of tracebacks; failures are reported in the notes instead."""

POLL_SECONDS = 0.01
TAIL = 20
"""The number of lines of a failed run's output that an error shows."""


@dataclass(frozen=True)
class Verdict:
    """What was compared, and every difference. ``notes`` report plugins that failed, what was not
    compared, and differing metrics of plugins, which need not be functions of the training."""

    compared: list[str]
    differences: list[str]
    notes: list[str]


def verify_resume(
    arguments: Sequence[str], folder: Path, steps: int, *, deterministic: bool
) -> Verdict:
    """Train ``steps`` steps in one go; train again, kill that run by SIGKILL after half of the
    steps and resume it; compare both.

    ``arguments`` are those of apt-train; ``folder`` is empty. ``deterministic`` asks for
    deterministic kernels. Raises TrainingError for a run that fails.
    """
    every = ["training.log_every_steps=1", "training.keep_last=0", "evaluation.sample_tokens=0"]
    if deterministic:
        every.append("training.deterministic=true")
    settings = [word for setting in every for word in ("--set", setting)]
    command = apt_train_command([*arguments, *settings])
    until = ["--stop-at-step", str(steps)]
    whole, killed = folder / "in_one_go", folder / "killed_and_resumed"
    _run([*command, "--output", str(whole), *until])
    # A short profile ends before ``steps``.
    steps = checkpoint.load(checkpoint.list_checkpoints(whole / "checkpoints")[-1]).state.step
    half = max(1, steps // 2)
    saving = ["--set", f"training.save_every_steps={half}"]
    at = killed / "checkpoints" / checkpoint.folder_name(half)
    _run_until([*command, "--output", str(killed), *saving], at)
    _run([*command, "--output", str(killed), "--resume-from", str(at), *until])
    return _verdict(whole, killed, half, steps)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise TrainingError(_failed(done.returncode, done.stdout + done.stderr))


def _run_until(command: Sequence[str], appears: Path) -> None:
    """Run ``command`` until the path ``appears`` exists, then kill all its processes."""
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
    """All descendants of the process ``pid``, children before their parents. They are found one by
    one, since the processes of --nproc have sessions of their own."""
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


def _verdict(whole: Path, killed: Path, half: int, steps: int) -> Verdict:
    found = compare_runs(whole, killed, step=steps, after=half, names=("in one go", "resumed"))
    told = [each for each in found.differences if each.what != RECORDS]
    name = f"checkpoints/{checkpoint.folder_name(steps)}"
    expected, actual = (checkpoint.load(run / name, verify=False) for run in (whole, killed))
    notes = _failures({"in one go": expected, "resumed": actual})
    records = expected.state.plugin_records.items()
    waiting = sorted(name for name, record in records if record.state == "dormant")
    notes += [f"a metric of a plugin differs: {each}" for each in told if each.foreign]
    if waiting:
        notes.append(
            f"nothing was compared of {', '.join(waiting)}, not enabled after {steps} steps: "
            "bring the schedule forward (schedules.enable_…_at_step) to try a resume with it"
        )
    modes = expected.state.modes
    frozen = [name for name in modes.staged if not modes.now.get(f"{PARAMETER}{name}", True)]
    if frozen:
        notes.append(
            f"{listed(frozen)}: frozen after {steps} steps, so that nothing was compared of a "
            "stage that thaws it later: bring that forward, or compare more steps (--stop-at-step)"
        )
    return Verdict(found.compared, [str(each) for each in told if not each.foreign], notes)


def _failures(found: Mapping[str, Checkpoint]) -> list[str]:
    """The first failure of each plugin, and the runs in which it happened."""
    runs_of: dict[str, list[str]] = {}
    for run, saved in found.items():
        for name, record in saved.state.plugin_records.items():
            # The first failure suffices: a quarantine prevents most later ones.
            for failure in record.failures[:1]:
                place = f" at {failure.where}" if failure.where else ""
                text = (
                    f"plugin {name} is {record.state}: it failed in {failure.hook}{place}: "
                    f"{failure.error}"
                )
                runs_of.setdefault(text, []).append(run)
    return [
        f"{text} ({' and '.join(runs)}); what it did not do was not compared"
        for text, runs in sorted(runs_of.items())
    ]
