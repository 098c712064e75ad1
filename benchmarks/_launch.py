"""Starts apt-train, forked from this process or as a new one, and acts on it at chosen moments."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

from apt_core.cli.run_command import run_command
from apt_core.cli.train import app
from apt_core.parallel.child_process import apt_train_command

EVENTS = "APT_CHAOS_EVENTS"
"""The environment variable with the descriptor to which a run writes its events."""

BEACON = f"""\
import os

from apt_core import hookimpl

events = int(os.environ["{EVENTS}"])


def tell(event, step):
    os.write(events, f"{{event}} {{step}}\\n".encode())


@hookimpl
def on_training_start(trainer):
    tell("start", trainer.step)


@hookimpl
def on_step_start(step):
    tell("step", step)


@hookimpl
def on_evaluation_start(trainer):
    tell("evaluation", trainer.step)


@hookimpl
def on_generation_start(request):
    tell("sample", 0)


@hookimpl
def on_epoch_end(epoch):
    tell("epoch", epoch)


@hookimpl
def apt_state_dict(trainer):
    tell("save", trainer.step)
    return {{"kept": 1}}


@hookimpl
def apt_load_state_dict(state):
    tell("resume", 0)


@hookimpl
def on_checkpoint_saved(path):
    tell("saved", 0)


@hookimpl
def on_training_end(trainer):
    tell("end", trainer.step)
"""
"""An observer that writes the events of a run."""

SECONDS = 120.0
"""A run that takes longer counts as hung."""


@dataclass(frozen=True)
class Strike:
    """Calls ``act(pid)`` ``delay`` seconds after the ``count``-th next ``event``.

    The event "launch" is the start of the process.
    """

    event: str
    count: int
    delay: float
    act: Callable[[int], None]


@dataclass
class _Waiting:
    """A chain of strikes; the first one left is due next."""

    left: list[Strike]
    seen: int = 0

    def due(self, event: str) -> list[Strike]:
        if not self.left or event != self.left[0].event:
            return []
        self.seen += 1
        if self.seen < self.left[0].count:
            return []
        self.seen = 0
        return [self.left.pop(0)]


@dataclass
class Launched:
    """How a run ended: its exit code (negative for a signal, None where it hung), its events with
    their steps, and what it printed."""

    code: int | None
    events: list[tuple[str, int]] = field(default_factory=list)
    printed: str = ""

    @property
    def start(self) -> int | None:
        """The step after which training started; None where it did not start."""
        return next((step for event, step in self.events if event == "start"), None)


@dataclass
class Running:
    """A started run, until :meth:`wait` is called."""

    pid: int
    events: int
    output: Path
    unread: bytes = b""

    def wait(self, chains: Iterable[Sequence[Strike]] = ()) -> Launched:
        """Wait for the end of the run, and strike when strikes are due: in each chain one after the
        other."""
        found = Launched(None)
        waiting = [_Waiting(list(chain)) for chain in chains if chain]
        ended = os.pidfd_open(self.pid)
        poll = select.poll()
        poll.register(self.events, select.POLLIN)
        poll.register(ended, select.POLLIN)
        new = [("launch", 0)]
        deadline = time.monotonic() + SECONDS
        try:
            while True:
                due = [
                    strike for event, _ in new for chain in waiting for strike in chain.due(event)
                ]
                for strike in due:
                    time.sleep(strike.delay)
                    if not _is_over(ended):
                        strike.act(self.pid)
                ready = {descriptor for descriptor, _ in poll.poll(1000)}
                over = ended in ready
                new = self._read()
                found.events += new
                if over and not new:
                    break
                if time.monotonic() > deadline:
                    os.kill(self.pid, signal.SIGKILL)
                    os.waitpid(self.pid, 0)
                    found.printed = self._read_output()
                    return found
        finally:
            os.close(ended)
            os.close(self.events)
        found.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        found.printed = self._read_output()
        return found

    def _read(self) -> list[tuple[str, int]]:
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self.events, 1 << 16):
                self.unread += block
        *lines, self.unread = self.unread.split(b"\n")
        words = (line.decode().split() for line in lines)
        return [(event, int(step)) for event, step in words]

    def _read_output(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


def _is_over(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def launch(
    arguments: Sequence[str],
    folder: Path,
    *,
    forked: bool = True,
    surroundings: Callable[[], None] | None = None,
) -> Running:
    """Start ``apt-train ARGUMENTS`` in ``folder``; a forked child first calls ``surroundings``."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    output = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if not forked:
            process = subprocess.Popen(
                apt_train_command(arguments),
                cwd=folder,
                env=os.environ | {EVENTS: str(writer)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                pass_fds=[writer],
            )
            process.returncode = 0  # so that Popen does not wait for it: Running.wait does
            return Running(process.pid, reader, output)
        with warnings.catch_warnings():
            # With one thread, torch has no pool of threads that a fork would lose.
            warnings.simplefilter("ignore", DeprecationWarning)
            sys.stdout.flush()
            sys.stderr.flush()
            child = os.fork()
        if not child:
            _train(arguments, folder, file, writer, surroundings)
        return Running(child, reader, output)
    finally:
        os.close(file)
        os.close(writer)


def _train(
    arguments: Sequence[str],
    folder: Path,
    file: int,
    writer: int,
    surroundings: Callable[[], None] | None,
) -> None:
    """Run the command in the forked child, and exit: never returns."""
    code = 70
    try:
        for number in (1, 2):
            os.dup2(file, number)
        os.environ[EVENTS] = str(writer)
        sys.stdout, sys.stderr = (
            open(number, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
            for number in (1, 2)
        )
        os.chdir(folder)
        if surroundings is not None:
            surroundings()
        code = run_command(app, "apt-train", list(arguments))
    except BaseException:
        os.write(2, f"escaped from the command:\n{traceback.format_exc()}".encode())
    finally:
        os._exit(code)


def make_clock_jump(seed: int) -> None:
    """Make the clock of this process jump forth and back, by up to years."""
    chance = random.Random(seed)
    real, real_ns, offset = time.time, time.time_ns, 0

    def jump() -> int:
        nonlocal offset
        if chance.random() < 0.3:
            offset = chance.choice([-(10**8), -86400, -3600, -1, 0, 1, 3600, 10**8])
        return offset

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.fromtimestamp(real() + jump(), tz)

    replaced: dict[int, Any] = {
        id(real): lambda: real() + jump(),
        id(real_ns): lambda: real_ns() + jump() * 10**9,
        id(datetime): Jumping,
    }
    modules = [module for name, module in sys.modules.items() if name.startswith("apt_")]
    for module in [time, *modules]:
        for name, value in list(vars(module).items()):
            if id(value) in replaced:
                setattr(module, name, replaced[id(value)])


def make_device_fail(broken: Path) -> None:
    """Make fsync, replace and rename fail with EIO while the file ``broken`` exists."""

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if broken.exists():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **options)

        return call

    for name in ("fsync", "replace", "rename"):
        setattr(os, name, failing(getattr(os, name)))
