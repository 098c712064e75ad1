"""Faults in one of two processes: what is to come of them, as data, and runs that show it.

The processes are forked from this one, which has imported everything, and are started, watched and
told to stop by the launcher of ``apt-train --nproc 2``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fault_kinds
import torch
import yaml
from fault_matrix import FAILS, GOES_ON, INTERRUPTED, STOPS, Outcome
from fault_runs import PROFILE, TEXT, Left, _noting_the_start, enter, finished, source_of

from apt_core.cli.run_command import run_command
from apt_core.cli.train import app
from apt_core.errors import CheckpointError
from apt_core.parallel import launch
from apt_core.parallel import world as distributed
from apt_core.runs import checkpoint
from apt_core.training.run import Run

STEPS = 6
SAVES_EVERY = 2

TRAINING = {**PROFILE["training"], "grad_accum_steps": 1, "max_steps": STEPS,
            "save_every_steps": SAVES_EVERY, "hook_timeout": 0.5}  # fmt: skip
KEYS = {**PROFILE, "training": TRAINING,
        "evaluation": {"eval_freq": 3, "eval_batches": 2, "sample_tokens": 0}}  # fmt: skip

SECONDS = 60.0
"""After which a pair hangs, however long its processes may wait for each other."""

PATIENCE_SECONDS = 4.0
"""How long processes wait for one that hangs, and the launcher for it to end."""

LATE_SECONDS = 1.0
"""How long a hook takes that is late."""

SOURCE = """import fault_pairs
from apt_core import hookimpl


@hookimpl
def {hook}({names}):
    return fault_pairs.act('{hook}', {given})
"""


def _exit(hook: str, arguments: fault_kinds.Arguments) -> Any:
    os._exit(3)


def _kill(hook: str, arguments: fault_kinds.Arguments) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _interrupt(hook: str, arguments: fault_kinds.Arguments) -> Any:
    os.kill(os.getpid(), signal.SIGINT)


def _leave(hook: str, arguments: fault_kinds.Arguments) -> Any:
    os._exit(0)


def _hang(hook: str, arguments: fault_kinds.Arguments) -> Any:
    while True:
        time.sleep(SECONDS)


def _late(hook: str, arguments: fault_kinds.Arguments) -> Any:
    time.sleep(LATE_SECONDS)


OWN: dict[str, fault_kinds.Fault] = {
    "exits": _exit,
    "killed": _kill,
    "leaves": _leave,
    "hangs": _hang,
    "interrupted": _interrupt,
    "late": _late,
}
"""Kinds of fault that only a process of its own survives, or that take time."""

ENDS = ("killed", "exits", "leaves", "hangs")
"""Those of them after which a process does nothing more."""


def act(hook: str, arguments: fault_kinds.Arguments) -> Any:
    """Commit the planned fault where it is due."""
    kinds = {**fault_kinds.kinds_of(hook), **OWN}
    if not fault_kinds.due(hook, arguments):
        return None
    return kinds[fault_kinds.planned.kind](hook, arguments)


# Cases -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Only in process ``rank`` the plugin commits a fault of ``kind``, in the ``call``-th call of
    ``hook``, under ``policy``, where the model is kept by ``sharding``; ``end`` is to come of it.

    ``says`` is to be in what the processes say, besides the plugin's name; ``named`` says whether
    that must be there at all: a process that was killed tells of nothing.
    """

    hook: str
    kind: str
    policy: str
    rank: int
    call: int
    end: Outcome
    says: str = ""
    named: bool = True
    sharding: str = "ddp"

    def __str__(self) -> str:
        sharding = "" if self.sharding == "ddp" else f"/{self.sharding}"
        return f"{self.hook}/{self.kind}/{self.policy}/process {self.rank}{sharding}"


LOST = "another process of the run has ended"
LOSS = "must train on the same loss"
KILLED = "process {} was killed by signal 9"
LEFT = "process {} ended with exit code 3"

PAIRS = [
    # An observer that fails in one of them goes on, and is told of with its process.
    Pair("on_training_start", "raise-ValueError", "isolate", 1, 1, GOES_ON, "process 1"),
    Pair("on_step_start", "raise-ValueError", "isolate", 1, 3, GOES_ON, "process 1"),
    Pair("on_step_start", "raise-ValueError", "isolate", 0, 3, GOES_ON),
    Pair("on_backward_end", "raise-SystemExit", "isolate", 1, 2, GOES_ON, "process 1"),
    Pair("on_step_end", "raise-ValueError", "isolate", 1, 4, GOES_ON, "process 1"),
    Pair("on_step_end", "raise-ValueError", "isolate", 1, STEPS, GOES_ON, "process 1"),
    Pair("on_evaluation_end", "raise-ValueError", "isolate", 1, 2, GOES_ON, "process 1"),
    Pair("on_evaluation_end", "raise-ValueError", "isolate", 0, 2, GOES_ON),
    Pair("on_checkpoint_saved", "raise-ValueError", "isolate", 0, 1, GOES_ON),
    Pair("on_epoch_end", "raise-SystemExit", "isolate", 1, 1, GOES_ON, "process 1"),
    Pair("apt_state_dict", "raise-ValueError", "isolate", 1, 1, GOES_ON, "process 1"),
    Pair("on_training_end", "raise-ValueError", "isolate", 1, 1, GOES_ON, "process 1"),
    Pair("on_training_end", "raise-ValueError", "isolate", 0, 1, GOES_ON),
    Pair("on_step_end", "late", "isolate", 1, 3, GOES_ON, "process 1"),
    Pair("on_step_end", "late", "isolate", 0, 3, GOES_ON),
    Pair("on_step_end", "state-eval-mode", "isolate", 1, 2, GOES_ON, "process 1"),
    Pair("on_step_end", "state-default-dtype", "isolate", 1, 2, GOES_ON, "process 1"),
    Pair("on_backward_end", "state-autocast", "isolate", 1, 2, GOES_ON, named=False),
    Pair("on_step_start", "raise-ValueError", "isolate", 1, 3, GOES_ON, "process 1",
         sharding="fsdp"),
    # What changes the loss, or may not fail, ends all of them.
    Pair("apt_loss_terms", "raise-ValueError", "isolate", 1, 3, FAILS, LOSS),
    Pair("apt_loss_terms", "raise-ValueError", "isolate", 0, 3, FAILS, LOSS),
    Pair("on_step_start", "raise-ValueError", "required", 1, 3, FAILS),
    Pair("on_step_start", "raise-ValueError", "required", 0, 3, FAILS),
    Pair("on_backward_end", "raise-ValueError", "strict", 1, 3, FAILS),
    Pair("on_evaluation_end", "raise-ValueError", "required", 1, 2, FAILS),
    Pair("on_checkpoint_saved", "raise-ValueError", "required", 0, 1, FAILS),
    Pair("on_training_start", "raise-ValueError", "strict", 1, 1, FAILS),
    Pair("on_training_end", "raise-ValueError", "required", 1, 1, FAILS),
    Pair("on_step_end", "late", "required", 1, 3, FAILS),
    Pair("on_step_end", "state-default-dtype", "strict", 1, 2, FAILS),
    # A wish to stop is that of all.
    Pair("on_step_start", "raise-StopTraining", "isolate", 1, 3, STOPS, named=False),
    Pair("on_step_end", "raise-StopTraining", "isolate", 0, 3, STOPS, named=False),
    Pair("on_evaluation_end", "raise-StopTraining", "isolate", 1, 2, STOPS, named=False),
    Pair("on_step_start", "interrupted", "isolate", 1, 3, INTERRUPTED, named=False),
    Pair("on_step_end", "interrupted", "isolate", 0, 3, INTERRUPTED, named=False),
    Pair("on_step_start", "raise-KeyboardInterrupt", "isolate", 1, 3, INTERRUPTED, named=False),
    # A process that is gone ends the others, and who that was is said.
    Pair("on_step_start", "killed", "isolate", 1, 3, FAILS, KILLED, named=False),
    Pair("on_step_start", "killed", "isolate", 0, 3, FAILS, KILLED, named=False),
    Pair("on_evaluation_end", "killed", "isolate", 1, 2, FAILS, KILLED, named=False),
    Pair("on_checkpoint_saved", "killed", "isolate", 0, 1, FAILS, KILLED, named=False),
    Pair("on_step_end", "killed", "isolate", 1, 3, FAILS, KILLED, named=False, sharding="fsdp"),
    Pair("on_step_end", "exits", "isolate", 1, 3, FAILS, LEFT, named=False),
    Pair("on_step_end", "exits", "isolate", 0, 3, FAILS, LEFT, named=False),
    Pair("on_training_start", "exits", "isolate", 1, 1, FAILS, LEFT, named=False),
    Pair("on_step_end", "leaves", "isolate", 1, 3, FAILS, LOST, named=False),
    Pair("on_step_end", "leaves", "isolate", 0, 3, FAILS, LOST, named=False),
    Pair("on_step_end", "hangs", "isolate", 1, 3, FAILS, LOST),
    Pair("on_step_end", "hangs", "isolate", 0, 3, FAILS, LOST),
]  # fmt: skip

FEW = [PAIRS[n] for n in (1, 11, 13, 16, 19, 27, 30, 33, 36, 41, 46)]
"""What is tried in every run of the tests."""

KNOWN: dict[str, str] = {
    "on_step_start/raise-KeyboardInterrupt/isolate/process 1": (
        "the process that raises it ends at once, as it would alone, and for the others it is gone:"
        " the manifest says failed, the exit code is that of an interrupt"
    ),
}
"""By case, why what comes of it is not yet what is expected."""


# Processes -------------------------------------------------------------------------------------


class _Forked:
    """Stands for a process that the launcher starts: a fork that runs apt-train."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], start_new_session: bool
    ) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                code = _work(command, env)
            except BaseException:
                sys.stderr.write("escaped from the command:\n" + traceback.format_exc())
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _work(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    rank = int(environment["RANK"])
    Path(f"pid-{rank}").write_text(str(os.getpid()))
    traces = open(f"hangs-{rank}", "w")  # noqa: SIM115
    faulthandler.dump_traceback_later(SECONDS - 10, file=traces)
    committed = os.open(f"seen-{rank}.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    fault_kinds.plan(_planned if rank == _rank else fault_kinds.Plan())
    Run.run = _noting_the_start(Run.run)  # type: ignore[method-assign]
    code = run_command(app, "apt-train", list(arguments))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    trainer = fault_kinds.seen.trainer
    what = {
        "code": code,
        "committed": fault_kinds.seen.committed,
        "step": None if trainer is None else trainer.step,
        "weights": None if trainer is None else _digest(trainer.model),
    }
    os.write(committed, json.dumps(what).encode())
    return code


_planned, _rank = fault_kinds.Plan(), 0


def _digest(model: torch.nn.Module) -> str:
    """A digest of all weights, or of this process's part of them."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        local = getattr(tensor, "to_local", lambda tensor=tensor: tensor)()
        digest.update(name.encode() + local.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _launched(folder: Path, plan: fault_kinds.Plan, rank: int, arguments: Sequence[str]) -> Left:
    """Run apt-train with these arguments in two processes; ``plan`` is that of one of them."""
    global _planned, _rank
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("stdout", "stderr"):
        (folder / name).unlink(missing_ok=True)
    for old in (*folder.glob("seen-*.json"), *folder.glob("pid-*")):
        old.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
    if child == 0:
        code = 70
        try:
            _planned, _rank = plan, rank
            enter(folder)
            changed: Any = launch
            changed.subprocess = SimpleNamespace(Popen=_Forked)
            changed.apt_train_command = list
            if plan.kind == "hangs":
                changed.SHUTDOWN_SECONDS = PATIENCE_SECONDS
                distributed.PATIENCE = timedelta(seconds=PATIENCE_SECONDS)
            code = launch.launch(2, arguments)
        except BaseException:
            sys.stderr.write("escaped from the launcher:\n" + traceback.format_exc())
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)
    left = finished(child, folder, SECONDS)
    if left.code is None:
        for file_of_pid in folder.glob("pid-*"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file_of_pid.read_text()), signal.SIGKILL)
    return left


def seen_of(left: Left, rank: int) -> dict[str, Any]:
    """What a process noted at its end; nothing where it did not come to that."""
    text = left.text(f"seen-{rank}.json")
    return json.loads(text) if text else {}


# The laboratory --------------------------------------------------------------------------------


class Pairs:
    """Runs cases in two processes, and judges them by a run of two without a fault."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        (root / "text.txt").write_text(TEXT, encoding="utf-8")
        os.environ["APT_CACHE"] = str(root / "cache")
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        self._quiet: dict[str, Left] = {}
        self._count = 0
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            run_command(app, "apt-train", self._arguments("quiet", [], root / "warm"))

    def _arguments(
        self, name: str, plugins: list[dict[str, Any]], output: Path, *more: str
    ) -> list[str]:
        profile = self.root / f"{name}.yaml"
        if not profile.exists():
            content = {**KEYS, "name": "pairs", "data": {"train_path": str(self.root / "text.txt")}}
            profile.write_text(yaml.safe_dump(content | ({"plugins": plugins} if plugins else {})))
        return ["-p", str(profile), "--output", str(output), *more]

    def quiet(self, sharding: str) -> Left:
        """The run of two processes without a fault."""
        if sharding not in self._quiet:
            folder = self.root / f"quiet-{sharding}"
            words = self._arguments("quiet", [], folder / "run", *_sharded(sharding))
            left = _launched(folder, fault_kinds.Plan(), 0, words)
            if left.code or [seen_of(left, rank).get("step") for rank in (0, 1)] != [STEPS] * 2:
                raise RuntimeError(f"the quiet run of two processes fails: {left.said}")
            self._quiet[sharding] = left
        return self._quiet[sharding]

    def run(self, case: Pair, *, keep: bool = False) -> list[str]:
        """Run a case; all that is not as expected."""
        self._count += 1
        folder = self.root / f"pair-{self._count:03d}"
        plugin = self.root / case.hook / "faulty.py"
        plugin.parent.mkdir(exist_ok=True)
        plugin.write_text(source_of(SOURCE, case.hook), encoding="utf-8")
        on_failure = "required" if case.policy == "required" else "isolate"
        plugins = [{"name": str(plugin), "on_failure": on_failure}]
        strict = ["--strict"] * (case.policy == "strict")
        name = f"{case.hook}-{on_failure}"
        words = self._arguments(name, plugins, folder / "run", *strict, *_sharded(case.sharding))
        plan = fault_kinds.Plan(case.kind, case.call)
        wrong = [*self._judged(case, _launched(folder, plan, case.rank, words))]
        if keep:
            wrong += [f"(kept: {folder})"] if wrong else []
        else:
            shutil.rmtree(folder, ignore_errors=True)
        return wrong

    def _judged(self, case: Pair, left: Left) -> Iterator[str]:
        own, other = seen_of(left, case.rank), seen_of(left, 1 - case.rank)
        if left.code is None:
            yield "hangs:\n" + "".join(left.text(f"hangs-{rank}") for rank in (0, 1))
            return
        if own and not own["committed"]:
            yield "the fault was not committed"
        if left.code != case.end.code:
            yield f"exit code {left.code}, expected {case.end.code} ({case.end.name})"
        told = left.said + left.text("run/log.txt")
        flat = " ".join(told.split())
        for text in ("unexpected failure", "escaped from", "Logging error"):
            if text in told:
                yield f"it says {text!r}"
        if case.named and "faulty" not in flat:
            yield "the plugin is not named"
        if case.says.format(case.rank) not in flat:
            yield f"{case.says.format(case.rank)!r} is not said"
        status = left.manifest.get("status")
        # The first process writes it: where that one was killed, it says what it said before.
        gone = case.kind in ENDS and case.rank == 0
        if status != ("running" if gone else case.end.status):
            yield f"the manifest says {status!r}, not {case.end.status!r}"
        if not other:
            yield "the other process did not come to its end"
            return
        if case.end in (GOES_ON, STOPS, INTERRUPTED):
            yield from self._together(case, own, other, left)
        yield from self._intact(case, left)
        if case.end is not GOES_ON and left.code == case.end.code:
            yield from self._going_on(case, left)

    def _together(
        self, case: Pair, own: dict[str, Any], other: dict[str, Any], left: Left
    ) -> Iterator[str]:
        """Did both processes come to the same step, and the same weights?"""
        if (own.get("step"), own.get("code")) != (other["step"], other["code"]):
            yield f"they end apart: {own}, {other}"
        if case.sharding == "ddp" and own.get("weights") != other["weights"]:
            yield "their weights differ"
        if other["step"] not in left.checkpoints():
            yield f"no checkpoint of step {other['step']}: {sorted(left.checkpoints())}"
        if case.end is GOES_ON:
            for rank, seen in ((case.rank, own), (1 - case.rank, other)):
                if seen.get("weights") != seen_of(self.quiet(case.sharding), rank)["weights"]:
                    yield f"the weights of process {rank} are not those of the quiet run"

    def _intact(self, case: Pair, left: Left) -> Iterator[str]:
        """Is every checkpoint intact, and that of the quiet run where it has one of the step?"""
        others = self.quiet(case.sharding).checkpoints()
        for step, path in left.checkpoints().items():
            try:
                checkpoint.load(path)
            except CheckpointError as error:
                yield f"the checkpoint of step {step} is not intact: {error}"
                continue
            # Shards name the save that they are of.
            if step not in others or case.sharding == "fsdp":
                continue
            for theirs in others[step].rglob("*.safetensors"):
                mine = path / theirs.relative_to(others[step])
                if not mine.exists() or mine.read_bytes() != theirs.read_bytes():
                    yield f"{theirs.name} of step {step} is not that of the quiet run"

    def _going_on(self, case: Pair, left: Left) -> Iterator[str]:
        """Does a resume without the plugin come to the end of the quiet run?"""
        going_on = ["--resume"] if left.checkpoints() else []
        output = left.run if going_on else left.folder / "anew"
        words = self._arguments("quiet", [], output, *going_on, *_sharded(case.sharding))
        again = _launched(left.folder, fault_kinds.Plan(), 0, words)
        if again.code != 0:
            yield f"the run cannot go on: {again.text('stderr')[-400:]}"
            return
        for rank in (0, 1):
            quiet = seen_of(self.quiet(case.sharding), rank)
            if seen_of(again, rank).get("weights") != quiet["weights"]:
                yield f"process {rank} of the run that went on has other weights"


def _sharded(sharding: str) -> list[str]:
    return ["--hardware.distributed", sharding]


def run_pairs(
    root: Path,
    cases: Sequence[Pair],
    tell: Callable[[Pair, list[str], float], None],
    *,
    keep: bool = False,
) -> int:
    """Run the cases one after the other, and tell of each; how many are not as expected. One that
    is KNOWN not to be is unexpected where it is."""
    pairs, unexpected = Pairs(root), 0
    for case in cases:
        began = time.perf_counter()
        wrong = pairs.run(case, keep=keep)
        known = KNOWN.get(str(case))
        if known and not wrong:
            wrong = [f"as expected, though it is known not to be: {known}"]
        elif known:
            wrong = []
        unexpected += bool(wrong)
        tell(case, wrong, time.perf_counter() - began)
    return unexpected
