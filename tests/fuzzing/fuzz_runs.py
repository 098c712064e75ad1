"""Feeding inputs in forked children: each within a deadline, a bound of memory, and its folder."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fuzz_targets import DECLARED, Target, empty

DEADLINE = 10
"""Seconds of the processor that an input may take."""

PATIENCE = 60
"""Seconds that it may take by the clock: what waits takes none of the processor's, and others may
use that too."""

MEMORY = 3 << 30
"""Bytes of address space that a child may take beyond what it begins with."""

WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate"}


class TooLong(BaseException):
    """An input takes longer than it may."""


@dataclass(frozen=True)
class Finding:
    """An input of which something else came than a declared error; ``where`` tells such apart."""

    target: str
    number: int
    error: str
    where: str
    details: str


@dataclass
class Tally:
    """What came of the inputs of a target."""

    outcomes: Counter[str]
    findings: list[Finding]

    @property
    def tried(self) -> int:
        return sum(self.outcomes.values())


def source_of(seed: int, target: str, number: int) -> random.Random:
    """The random numbers that an input is made of."""
    return random.Random(f"{seed}/{target}/{number}")


class Guard:
    """Hears of files that are written outside of a folder. There is no way to stop hearing, so
    that it is asked to be ``active``."""

    def __init__(self) -> None:
        self.inside = ""
        self.active = False
        self.found: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in WRITES:
            path = arguments[0]
        else:
            return
        if isinstance(path, str | bytes):
            real = os.path.realpath(os.fsdecode(path))
            if not real.startswith((self.inside, "/dev/null", "/proc/self")):
                self.found.append(f"{event} {real}")


def feed(target: Target, seed: int, number: int, guard: Guard) -> tuple[str, Finding | None]:
    """What comes of one input, in the working directory, which is emptied before."""
    given = target.make(source_of(seed, target.name, number))
    empty(Path())
    known = set(sys.modules)
    path, argv = list(sys.path), list(sys.argv)
    guard.found, guard.active = [], True
    error: BaseException | None = None
    outcome = ""
    signal.setitimer(signal.ITIMER_PROF, DEADLINE)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        outcome = target.feed(given)
    except DECLARED as refusal:
        try:
            str(refusal).encode("utf-8", "surrogatepass")
            outcome = "refused" if refusal.exit_code == 2 else "failed"
        except BaseException as found:
            error = found
    except BaseException as found:
        error = found
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        guard.active = False
        sys.path[:], sys.argv[:] = path, argv
        for name in [n for n in sys.modules if n.startswith("apt_plugin_") and n not in known]:
            del sys.modules[name]
    if error is None and guard.found:
        error = PermissionError(f"written outside of its folder: {guard.found[:3]}")
    if error is None:
        return outcome, None
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "fuzz_" not in f.filename] or frames
    where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    ours = [f for f in own if "apt_core" in f.filename or "apt_plugins" in f.filename]
    if ours:
        where += f" from {Path(ours[-1].filename).name}:{ours[-1].lineno}"
    details = "".join(traceback.format_exception(error))[-6000:]
    text = f"{type(error).__name__}: {error}"[:300]
    return "unexpected", Finding(target.name, number, text, where, details)


@contextmanager
def bounded() -> Iterator[None]:
    """A bound of memory, and an alarm that raises."""

    def ring(number: int, frame: Any) -> None:
        raise TooLong(f"more than {PATIENCE if number == signal.SIGALRM else DEADLINE} s")

    signal.signal(signal.SIGALRM, ring)
    signal.signal(signal.SIGPROF, ring)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    yield


def child(target: Target, seed: int, numbers: Sequence[int], folder: Path, told: int) -> None:
    """Feed inputs, and tell of each on the descriptor ``told``."""
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.chdir(folder)
    os.environ.update(APT_CACHE=str(folder / "cache"), HOME=str(folder), TMPDIR=str(folder))
    tempfile.tempdir = None
    sys.dont_write_bytecode = True
    guard = Guard()
    guard.inside = str(folder.resolve())
    with bounded(), os.fdopen(told, "w", buffering=1) as out:
        for number in numbers:
            out.write(json.dumps({"begun": number}) + "\n")
            outcome, finding = feed(target, seed, number, guard)
            out.write(json.dumps({"outcome": outcome, "finding": finding and asdict(finding)}))
            out.write("\n")


def fuzz(
    target: Target,
    seed: int,
    numbers: Sequence[int],
    folder: Path,
    *,
    jobs: int = 1,
    tell: Callable[[Finding | None], None] = lambda finding: None,
) -> Tally:
    """Feed the inputs of these ``numbers``; a child that dies is a finding, and another goes on."""
    tally = Tally(Counter(), [])
    waiting = {job: list(numbers[job::jobs]) for job in range(jobs)}
    readers: dict[int, tuple[int, int, bytes]] = {}

    def start(job: int) -> None:
        if not waiting[job]:
            return
        place = folder / f"{target.name}-{job}"
        place.mkdir(parents=True, exist_ok=True)
        reads, writes = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(reads)
                child(target, seed, waiting[job], place, writes)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(writes)
        readers[reads] = job, pid, b""

    def take(row: dict[str, Any], job: int) -> None:
        if "begun" in row:
            return
        waiting[job].pop(0)
        tally.outcomes[row["outcome"]] += 1
        finding = Finding(**row["finding"]) if row["finding"] else None
        tally.findings += [finding] if finding else []
        tell(finding)

    for job in waiting:
        start(job)
    while readers:
        for ready in select.select(list(readers), [], [])[0]:
            job, pid, rest = readers[ready]
            data = os.read(ready, 1 << 16)
            *lines, rest = (rest + data).split(b"\n")
            readers[ready] = job, pid, rest
            for line in lines:
                take(json.loads(line), job)
            if data:
                continue
            os.close(ready)
            del readers[ready]
            status = os.waitpid(pid, 0)[1]
            if waiting[job]:
                error = f"the process died: {os.waitstatus_to_exitcode(status)}"
                dead = Finding(target.name, waiting[job][0], error, "", "")
                take({"outcome": "unexpected", "finding": asdict(dead)}, job)
                start(job)
    return tally


def seconds_since(began: float) -> float:
    return round(time.perf_counter() - began, 1)
