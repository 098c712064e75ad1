"""Does a run that is struck again and again end like one that is left alone?

python benchmarks/chaos.py --quick                   # about ten events
python benchmarks/chaos.py --json benchmarks/results/chaos.json
python benchmarks/chaos.py --seed 3 --case 17        # one of those runs
python benchmarks/chaos.py --only sigkill --only damaged
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads would not survive a fork

import torch
import yaml

from _harness import command_of, describe_machine
from _launch import (
    BEACON,
    Launched,
    Running,
    Strike,
    launch,
    make_clock_jump,
    make_device_fail,
)
from apt_core.errors import CheckpointError
from apt_core.runs import checkpoint, scores
from apt_core.runs.compare import VOLATILE, compare_checkpoints
from apt_core.runs.folder import versions
from apt_core.training.verify import RECORDS

STEPS = 48
EVENTS, QUICK_EVENTS = 250, 10
HITS = 8
"""The most launches of a run that are struck; the next one runs to the end."""

PROFILE: dict[str, Any] = {
    "name": "chaos",
    "model": {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32, "vocab_size": 256,
              "max_seq_len": 16, "dropout": 0.1},
    "training": {"batch_size": 2, "grad_accum_steps": 2, "max_epochs": 10, "max_steps": STEPS,
                 "learning_rate": 1e-3, "warmup_steps": 4, "log_every_steps": 1,
                 "save_every_steps": 5, "keep_last": 3, "mixed_precision": False},
    "evaluation": {"eval_freq": 6, "eval_batches": 2, "sample_tokens": 3},
    "hardware": {"device": "cpu"},
}  # fmt: skip
"""Epochs of eleven steps; epochs, saves and evaluations end at different steps."""

TEXT = "".join(
    f"{n} apples and {n + 1} pears are {2 * n + 1} pieces of fruit.\n" for n in range(24)
)

KEEPER = """\
import torch

from apt_core import hookimpl

kept = {"calls": 0, "sum": torch.zeros(4)}


@hookimpl
def apt_loss_terms(output):
    kept["calls"] += 1
    kept["sum"] += output.logits.detach()[0, 0, :4]
    weight = 1e-3 * (kept["calls"] % 7) * (1 + kept["sum"].sum().sin().item())
    return {"square": weight * output.logits.square().mean()}


@hookimpl
def apt_state_dict():
    return kept


@hookimpl
def apt_load_state_dict(state):
    kept.update(state)
"""
"""A loss term whose weight depends on all earlier calls: a resume that loses or repeats a call
changes all weights after it."""

FLAKY = """\
import random
import time

import torch

from apt_core import hookimpl

chance = random.Random({seed})


def act():
    torch.rand(chance.randrange(4))
    kind = chance.randrange(8)
    if kind == 0:
        raise chance.choice([RuntimeError, OSError, SystemExit, MemoryError])("flaky")
    if kind == 1:
        time.sleep(0.02)
    return chance.choice([float("inf"), object(), -1, "x", [[]]]) if kind == 2 else None


@hookimpl
def on_step_end():
    return act()


@hookimpl
def on_evaluation_end():
    return act()


@hookimpl
def on_checkpoint_saved():
    return act()


@hookimpl
def apt_metrics():
    return act()


@hookimpl
def apt_state_dict():
    return act()
"""
"""An observer that raises, draws, waits and returns invalid values; it is active in some launches
only."""

FULL = 256
"""Bytes that are left on a full disk."""


@dataclass
class Disk:
    """The folder of the runs, on a small file system if one can be mounted; ``why_not`` says why
    none could."""

    path: Path
    why_not: str = ""

    def fill(self, pid: int) -> None:
        """Fill the file system; where it is not our own, forbid ``pid`` to write."""
        if self.why_not:
            hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
            return
        with (self.path / "ballast").open("ab", buffering=0) as file, suppress(OSError):
            for size in (1 << 16, 1 << 8):
                with suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def empty(self, pid: int | None = None) -> None:
        """Undo :meth:`fill`."""
        if self.why_not and pid is not None:
            hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
        (self.path / "ballast").unlink(missing_ok=True)

    def protect(self, folder: Path) -> None:
        """Make ``folder`` read-only for everyone."""
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        # The remount fails while a file is open that was opened since the mount above.
        for _ in range(20):
            words = ["mount", "-o", "remount,bind,ro", folder]
            if not subprocess.run(words, check=False, capture_output=True).returncode:
                return
            self.release(folder)
            subprocess.run(["mount", "--bind", folder, folder], check=True)
        raise SystemExit(f"{folder} cannot be made read-only")

    def release(self, folder: Path) -> None:
        subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)


@contextmanager
def small_disk(path: Path) -> Iterator[Disk]:
    """A file system of 6 MB at ``path``, private to this process and its children."""
    path.mkdir()
    new_mounts = 0x20000
    if os.geteuid() or ctypes.CDLL(None, use_errno=True).unshare(new_mounts):
        why_not = "mounting needs the rights of root"
    else:
        subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False)
        words = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(path)]
        why_not = subprocess.run(words, capture_output=True, text=True, check=False).stderr.strip()
    try:
        yield Disk(path.resolve(), why_not)
    finally:
        if not why_not:
            subprocess.run(["umount", "--lazy", str(path)], check=False)


@dataclass
class Case:
    """One run that is struck: its folder, and what to expect of it."""

    root: Path
    disk: Disk
    plugins: Path
    chance: random.Random
    forked: bool
    run: Path = field(init=False)
    moves: int = 0
    damaged: set[str] = field(default_factory=set)
    """Names of checkpoints that a resume must pass over."""
    rows_lost_until: int = 0
    """Rows up to this step were deleted."""
    rows_deleted: bool = False
    """Rows were deleted during this launch. The following fields concern one launch too."""
    flaky: int | None = None
    surroundings: list[Callable[[], None]] = field(default_factory=list)
    rivals: int = 0
    disk_fails: bool = False
    signals: set[int] = field(default_factory=set)
    happened: list[str] = field(default_factory=list)
    undo: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.run = self.root / "run-0"

    @property
    def checkpoints(self) -> list[Path]:
        return checkpoint.list_checkpoints(self.run / "checkpoints")

    @property
    def intact(self) -> list[Path]:
        return [path for path in self.checkpoints if path.name not in self.damaged]

    @property
    def newest(self) -> int:
        """The step after which a resume must go on."""
        return checkpoint.step_of(self.intact[-1]) if self.intact else 0

    def arguments(self) -> list[str]:
        words = ["--profile", str(self.plugins / "chaos.yaml"), "--output", str(self.run)]
        if self.flaky is not None:
            path = self.root / "flaky.py"
            path.write_text(FLAKY.format(seed=self.flaky), encoding="utf-8")
            words += ["--plugin", str(path)]
        return words + ["--resume"] * (self.run / "checkpoints").is_dir()


# Events ----------------------------------------------------------------------------------------

Event = Callable[[Case], list[Strike] | None]
"""Does what happens before a launch, and returns the strikes in it, in order; None where it does
not apply."""

MOMENTS = ("launch", "resume", "start", "step", "step", "save", "save", "saved", "evaluation",
           "sample", "epoch", "end")  # fmt: skip


def moment(case: Case, act: Callable[[int], None], *names: str) -> Strike:
    """A strike at a random moment, shortly after one of the events ``names``."""
    name = case.chance.choice(names or MOMENTS)
    if name == "resume" and not case.intact:
        name = "start"
    count = case.chance.randint(1, 12) if name == "step" else case.chance.randint(1, 2)
    if name in ("launch", "resume", "start", "end"):
        count = 1
    longest = 0.5 if name == "launch" else 0.02
    return Strike(name, count, case.chance.random() ** 2 * longest, act)


def sends(number: int, *more: int) -> Event:
    """An event that sends signals: the first at a random moment, the others soon after."""

    def event(case: Case) -> list[Strike]:
        def send(pid: int) -> None:
            case.signals.add(number)
            os.kill(pid, number)
            for other in more:
                time.sleep(case.chance.random() * 0.01)
                with suppress(ProcessLookupError):
                    os.kill(pid, other)
                case.signals.add(other)

        return [moment(case, send)]

    return event


def disk_full(case: Case) -> list[Strike]:
    def fill(pid: int) -> None:
        case.disk_fails = True
        case.disk.fill(pid)

    strikes = [moment(case, fill, "launch", "start", "step", "save")]
    if case.chance.random() < 0.6:
        strikes.append(moment(case, case.disk.empty, "step"))
    return strikes


def disk_fails(case: Case) -> list[Strike]:
    broken = case.root / "broken"
    case.surroundings.append(partial(make_device_fail, broken))

    def fail(pid: int) -> None:
        case.disk_fails = True
        broken.touch()

    strikes = [moment(case, fail, "launch", "start", "step", "save")]
    case.undo.callback(broken.unlink, missing_ok=True)
    if case.chance.random() < 0.6:
        strikes.append(moment(case, lambda pid: broken.unlink(missing_ok=True), "step"))
    return strikes


def read_only(case: Case) -> list[Strike]:
    folder = case.chance.choice([case.run, case.run / "checkpoints"])

    def protect(pid: int) -> None:
        if folder.is_dir():
            case.disk_fails = True
            case.disk.protect(folder)
            case.undo.callback(case.disk.release, folder)

    strikes = [moment(case, protect, "launch", "start", "step", "save")]
    if case.chance.random() < 0.6:
        strikes.append(moment(case, lambda pid: case.disk.release(folder), "step"))
    return strikes


def damaged(case: Case) -> list[Strike] | None:
    """Damage a file of one of the two newest checkpoints."""
    if not case.checkpoints:
        return None
    path = case.chance.choice(case.checkpoints[-2:])
    file = case.chance.choice(sorted(each for each in path.iterdir() if each.is_file()))
    content = bytearray(file.read_bytes())
    how = case.chance.choice(["flip", "cut", "delete", "zeros"])
    if how == "delete":
        file.unlink()
    else:
        place = case.chance.randrange(len(content))
        if how == "flip":
            content[place] ^= 1 << case.chance.randrange(8)
        elif how == "cut":
            del content[place:]
        else:
            content = bytearray(len(content))
        file.write_bytes(content)
    if file.name != scores.EVALUATION:
        case.damaged.add(path.name)
    return []


def deleted(case: Case) -> list[Strike] | None:
    """Delete the newest checkpoint."""
    if not case.checkpoints:
        return None
    case.damaged.discard(case.checkpoints[-1].name)
    shutil.rmtree(case.checkpoints[-1])
    return []


def strays(case: Case) -> list[Strike] | None:
    """Add half-written files, as of a process that died, and foreign files."""
    root = case.run / "checkpoints"
    if not root.is_dir():
        return None
    half = root / f".{checkpoint.folder_name(case.chance.randrange(STEPS))}.tmp"
    half.mkdir(exist_ok=True)
    (half / "model.safetensors").write_bytes(b"half")
    (root / f"step-{case.chance.choice(['x', '1', '99999999.part'])}").touch()
    (root / "notes.txt").write_text("mine")
    (case.run / ".manifest.json.1.tmp").write_text('{"profile"')
    return []


def rows_deleted(case: Case) -> list[Strike] | None:
    path = case.run / "metrics.jsonl"

    def delete(pid: int) -> None:
        case.rows_deleted = True
        path.unlink(missing_ok=True)

    if case.chance.random() < 0.5:
        return [moment(case, delete, "step", "save")]
    if not path.exists():
        return None
    path.unlink()
    case.rows_lost_until = max(case.rows_lost_until, case.newest)
    return []


def log_deleted(case: Case) -> list[Strike]:
    delete = lambda pid: (case.run / "log.txt").unlink(missing_ok=True)  # noqa: E731
    return [moment(case, delete, "launch", "step", "save")]


def rows_damaged(case: Case) -> list[Strike] | None:
    """Append a cut row, or a line that is no row."""
    path = case.run / "metrics.jsonl"
    if not path.exists():
        return None
    with path.open("ab") as file:
        file.write(case.chance.choice([b'{"step": 4', b"[]\n", b"null\n", b"\xff\x00\n", b"\n"]))
    return []


def moved(case: Case) -> list[Strike] | None:
    if not case.run.exists():
        return None
    case.moves += 1
    case.run = case.run.rename(case.root / f"run-{case.moves}")
    return []


def times_set_back(case: Case) -> list[Strike] | None:
    if not case.run.exists():
        return None
    for path in [case.run, *case.run.rglob("*")]:
        when = case.chance.choice([0, 10**9, 4 * 10**9])
        os.utime(path, (when, when))
    return []


def clock_jumps(case: Case) -> list[Strike]:
    case.surroundings.append(partial(make_clock_jump, case.chance.randrange(10**6)))
    return []


def plugin_fails(case: Case) -> list[Strike]:
    case.flaky = case.chance.randrange(10**6)
    return []


def two_starters(case: Case) -> list[Strike]:
    case.rivals = 1
    return []


KINDS: dict[str, tuple[str, Event]] = {
    "sigkill": ("SIGKILL", sends(signal.SIGKILL)),
    "sigterm": ("SIGTERM", sends(signal.SIGTERM)),
    "sigint": ("SIGINT", sends(signal.SIGINT)),
    "insisting": ("a second signal soon after the first", sends(signal.SIGTERM, signal.SIGINT)),
    "impatient": ("SIGTERM, then SIGKILL", sends(signal.SIGTERM, signal.SIGKILL)),
    "disk-full": ("a disk that is full, for a while or to the end", disk_full),
    "disk-fails": ("a disk that fails (EIO), for a while or to the end", disk_fails),
    "read-only": ("a folder that is made read-only", read_only),
    "damaged": ("a checkpoint with flipped, cut, zeroed or deleted files", damaged),
    "deleted": ("the newest checkpoint deleted", deleted),
    "strays": ("stray and half-written files", strays),
    "rows-deleted": ("metrics.jsonl deleted, while it runs and between", rows_deleted),
    "rows-damaged": ("rows of metrics.jsonl cut and foreign", rows_damaged),
    "log-deleted": ("log.txt deleted while it runs", log_deleted),
    "moved": ("the run's folder moved", moved),
    "times": ("times of files set back and ahead", times_set_back),
    "clock": ("a clock that jumps by up to years", clock_jumps),
    "plugin": ("a plugin that raises, waits and returns what is wrong", plugin_fails),
    "race": ("two starters for one folder", two_starters),
}
"""Kinds of events by name: a description, and the event."""

INEXACT = ("insisting",)
"""Kinds after which a run need not end like the quiet one: a run that dies in a step saves the
states of plugins that have seen a part of the step, and says so. They happen only with --only."""

ONLY_ROOT = ("read-only",)
ONLY_FORKED = ("clock", "disk-fails")
ENDS = ("sigkill", "sigterm", "sigint", "insisting", "impatient")
"""Kinds that end a launch; a launch gets at most one."""

# A run ------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """The outcome of one event; ``wrong`` lists what is not as it should be."""

    kind: str
    became: str
    wrong: list[str] = field(default_factory=list)


def drive(case: Case, kinds: Sequence[str], quiet: Path, limit: int) -> list[Outcome]:
    """Strike a run again and again, resume it each time, and compare its end with the quiet one."""
    outcomes: list[Outcome] = []
    history: list[str] = []
    for hit in range(HITS + 1):
        chosen = [] if hit == HITS or len(outcomes) >= limit else choose(case, kinds)
        found, became, wrong = one_launch(case, prepare(case, chosen))
        history.append(f"{' + '.join(case.happened) or 'nothing'}: {became}")
        if became == "finished":
            wrong += compare(case, quiet)
        elif not chosen:
            wrong.append(f"it did not finish when left alone: {became}")
        if wrong:
            wrong += [*history, f"last told {found.events[-3:]}", f"last said {tail(found)}"]
        outcomes += [Outcome(kind, became, wrong) for kind in case.happened]
        if wrong and not case.happened:
            outcomes.append(Outcome("left alone", became, wrong))
        if wrong or became == "finished":
            break
    return outcomes


def choose(case: Case, kinds: Sequence[str]) -> list[str]:
    """One to three kinds for the next launch, at most one of which ends it."""
    between = [kind for kind in kinds if kind not in ENDS]
    ends = [kind for kind in kinds if kind in ENDS]
    chosen = case.chance.sample(between, min(len(between), case.chance.randrange(3)))
    if ends and (not chosen or case.chance.random() < 0.8):
        chosen.append(case.chance.choice(ends))
    return chosen or [case.chance.choice(list(kinds))]


def prepare(case: Case, chosen: Sequence[str]) -> list[list[Strike]]:
    """Run the events that come before a launch; return the strikes in it, a chain per event."""
    case.flaky, case.rivals, case.disk_fails, case.surroundings = None, 0, False, []
    case.rows_deleted, case.signals, case.happened = False, set(), []
    chains = []
    for kind in chosen:
        strikes = KINDS[kind][1](case)
        if strikes:
            first = strikes[0]
            noted = replace(first, act=partial(_noted, case, kind, first.act))
            chains.append([noted, *strikes[1:]])
        elif strikes is not None:
            case.happened.append(kind)
    return chains


def _noted(case: Case, kind: str, act: Callable[[int], None], pid: int) -> None:
    case.happened.append(kind)
    act(pid)


def one_launch(case: Case, chains: Sequence[Sequence[Strike]]) -> tuple[Launched, str, list[str]]:
    """Launch the run; return the launch, its outcome in words, and what is wrong."""
    expected = case.newest
    hopeless = bool(case.checkpoints) and not case.intact
    arguments = case.arguments()

    def surroundings() -> None:
        for change in case.surroundings:
            change()

    def start() -> Running:
        return launch(arguments, case.root, forked=case.forked, surroundings=surroundings)

    with case.undo:
        rivals = [start() for _ in range(case.rivals)]
        found = start().wait(chains)
        results = [found, *(rival.wait() for rival in rivals)]
        case.disk.empty()
    case.undo = ExitStack()
    wrong = [problem for result in results for problem in complaints(case, result, bool(rivals))]
    runs = [result for result in results if result.start is not None]
    if len(runs) > 1 and not ran_one_after_the_other(runs):
        wrong.append("two runs went on in one folder")
    began = runs[0].start if runs else None
    if began is not None and len(runs) == 1:
        if began != expected:
            wrong.append(f"it went on after step {began}, the newest intact is of {expected}")
        case.damaged = {name for name in case.damaged if name <= checkpoint.folder_name(began)}
    if case.rows_deleted:
        steps = [step for run in runs for event, step in run.events if event == "step"]
        case.rows_lost_until = max(case.rows_lost_until, expected, *steps)
    if any(result.code == 0 for result in results):
        return found, "finished", wrong
    if hopeless and found.code in (1, 2):
        # No checkpoint is intact, and the run refused to resume: begin again.
        shutil.rmtree(case.run)
        case.damaged.clear()
        case.rows_lost_until = 0
        return found, "refused: no checkpoint was intact", wrong
    if began is None and found.code in (1, 2) and not case.disk_fails and not rivals:
        wrong.append(f"it was refused: {found.printed.strip()[-300:]}")
    return found, describe_exit(found.code), wrong


def ran_one_after_the_other(runs: Sequence[Launched]) -> bool:
    """Whether one of the runs had ended, so that another could follow it."""
    return any(run.events[-1][0] == "end" or run.code for run in runs)


def describe_exit(code: int | None) -> str:
    """The end of a process in words, by its exit code; None is a run that hung."""
    if code is None:
        return "hung"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code > 128:
        return f"stopped by {signal.Signals(code - 128).name}, with a checkpoint"
    return {0: "finished", 1: "ended with an error", 2: "refused"}.get(code, f"exit code {code}")


def complaints(case: Case, result: Launched, raced: bool) -> Iterator[str]:
    """What is wrong with one process: its exit code, or an unexpected failure in its output."""
    allowed = {0}
    for number in case.signals:
        allowed |= {-number, 128 + number}
    if case.disk_fails:
        allowed |= {1, 2}
    if raced or (case.checkpoints and not case.intact):
        allowed |= {1, 2}
    if result.start is None:
        allowed |= {1, 2}  # one_launch checks whether it had to be refused
    if result.code not in allowed:
        yield f"{describe_exit(result.code)}, of {sorted(allowed)}: {result.printed.strip()[-300:]}"
    for text in ("unexpected failure", "escaped from the command", "Fatal Python error"):
        if text in result.printed:
            yield result.printed[result.printed.index(text) :].strip()[:400]


def compare(case: Case, quiet: Path) -> list[str]:
    """The differences of the last checkpoint and the rows from those of the quiet run."""
    name = f"checkpoints/{checkpoint.folder_name(STEPS)}"
    try:
        expected, actual = checkpoint.load(quiet / name), checkpoint.load(case.run / name)
    except CheckpointError as error:
        return [f"the last checkpoint: {error}"]
    differences = [
        f"differs: {each}"
        for each in compare_checkpoints(expected, actual).differences
        if each.what.partition(": metrics")[0] != "the state" and each.what != RECORDS
    ]
    rows, twice = read_rows(case.run)
    differences += [f"two rows of {kind} after step {step}" for step, kind in twice]
    for key, row in read_rows(quiet)[0].items():
        if key[0] > case.rows_lost_until and rows.get(key) != row:
            differences.append(
                f"the row of {key[1]} after step {key[0]}: {rows.get(key)} for {row}"
            )
    return differences


def read_rows(run: Path) -> tuple[dict[tuple[int, str], dict[str, Any]], list[tuple[int, str]]]:
    """The rows of a run by step and kind, and the keys that occur twice.

    Values that vary between machines are left out, and those of the flaky plugin.
    """
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    twice = []
    path = run / "metrics.jsonl"
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            key = (row["step"], "training" if "loss" in row else "evaluation")
        except (ValueError, KeyError, TypeError):
            continue
        twice += [key] if key in rows else []
        rows[key] = {
            name: value
            for name, value in row.items()
            if not name.startswith((*VOLATILE, "flaky/", "metric/flaky"))
        }
    return rows, twice


def tail(found: Launched) -> str:
    return re.sub(r"\s+", " ", found.printed[-600:])


# All runs ---------------------------------------------------------------------------------------


@dataclass
class Chaos:
    """All runs of a seed, and the quiet run with which they are compared."""

    root: Path
    disk: Disk
    seed: int
    kinds: Sequence[str]
    real: int
    """Every so many-th run uses new processes, not forked ones; 0 for none."""

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        os.environ["APT_CACHE"] = str(self.root / "cache")
        (self.root / "text.txt").write_text(TEXT, encoding="utf-8")
        for name, source in (("beacon", BEACON), ("keeper", KEEPER)):
            (self.root / f"{name}.py").write_text(source, encoding="utf-8")
        profile = PROFILE | {
            "plugins": [str(self.root / "beacon.py"), str(self.root / "keeper.py")],
            "data": {"train_path": str(self.root / "text.txt")},
        }
        (self.root / "chaos.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
        words = ["--profile", str(self.root / "chaos.yaml"), "--output", str(self.root / "quiet")]
        found = launch(words, self.root).wait()
        if found.code:
            raise SystemExit(f"the quiet run ended with exit code {found.code}:\n{found.printed}")

    def case(self, number: int, limit: int) -> list[Outcome]:
        root = self.disk.path / f"case-{number}"
        root.mkdir()
        forked = not self.real or number % self.real != self.real - 1
        kinds = [kind for kind in self.kinds if forked or kind not in ONLY_FORKED]
        chance = random.Random(f"{self.seed}/{number}")
        case = Case(root, self.disk, self.root, chance, forked)
        try:
            return drive(case, kinds or ["sigkill"], self.root / "quiet", limit)
        finally:
            shutil.rmtree(root, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python benchmarks/chaos.py", None, __doc__, formatter_class=raw
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_EVENTS} events")
    parser.add_argument("--events", type=int, default=0, help=f"at least so many ({EVENTS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this run of the seed alone")
    parser.add_argument("--only", action="append", default=[], choices=KINDS, help="repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what came of it there")
    options = parser.parse_args(arguments)
    # Started in the background, this process ignores SIGINT, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wanted = options.events or (QUICK_EVENTS if options.quick else EVENTS)
    began = time.perf_counter()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="apt-chaos-") as folder:
        root = Path(folder).resolve()
        with small_disk(root / "disk") as disk:
            kinds = options.only or [kind for kind in KINDS if kind not in INEXACT]
            if disk.why_not:
                kinds = [kind for kind in kinds if kind not in ONLY_ROOT]
            if disk.why_not:
                print("no disk of its own (a limit on files stands for a full one, no folder is "
                      f"made read-only): {disk.why_not}")  # fmt: skip
            chaos = Chaos(root, disk, options.seed, kinds, 0 if options.quick else 10)
            number = 0 if options.case is None else options.case
            while len(outcomes) < wanted:
                new = chaos.case(number, wanted - len(outcomes) if options.quick else wanted)
                outcomes += new
                print_outcomes(number, new, len(outcomes), options)
                number += 1
                if options.case is not None:
                    break
    seconds = time.perf_counter() - began
    rows = table(outcomes)
    for row in rows:
        told = ", ".join(f"{count} {name}" for name, count in row["outcomes"].items())
        print(f"{row['kind']}: {row['tried']} tried, {row['unexpected']} unexpected ({told})")
    wrong = sum(bool(outcome.wrong) for outcome in outcomes)
    runs = number if options.case is None else 1
    print(f"{sum(row['tried'] for row in rows)} events in {runs} runs in {seconds:.0f} s, "
          f"{wrong} not as expected")  # fmt: skip
    if options.json:
        words = sys.argv[1:] if arguments is None else arguments
        content = {
            "tool": "chaos",
            "command": command_of("benchmarks/chaos.py", words),
            "seed": options.seed,
            "seconds": round(seconds, 1),
            "machine": describe_machine(),
            "versions": versions(),
            "rows": rows,
            "runs": runs,
            "left_out": disk.why_not,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


def print_outcomes(
    number: int, new: Sequence[Outcome], events: int, options: argparse.Namespace
) -> None:
    wrong = [line for outcome in new for line in outcome.wrong]
    print(
        f"run {number}: {len(new)} events, {events} in all{', WRONG' if wrong else ''}", flush=True
    )
    for line in dict.fromkeys(wrong):
        print(f"  {line}")
    if wrong:
        only = [word for kind in options.only for word in ("--only", kind)]
        words = [
            "python",
            "benchmarks/chaos.py",
            "--seed",
            str(options.seed),
            "--case",
            str(number),
        ]
        print(f"  again: {shlex.join([*words, *only])}", flush=True)


def table(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row per kind: how often it was tried, its outcomes, and how many were wrong."""
    rows = []
    named = {kind: words for kind, (words, _) in KINDS.items()} | {
        "left alone": "nothing more: left alone to its end"
    }
    for kind, words in named.items():
        own = [outcome for outcome in outcomes if outcome.kind == kind]
        if own:
            became = Counter(outcome.became for outcome in own)
            wrong = sum(bool(outcome.wrong) for outcome in own)
            rows.append({"kind": words, "tried": len(own),
                         "outcomes": dict(became.most_common()), "unexpected": wrong})  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
