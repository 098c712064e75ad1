"""The data of a run that begins while its store is still being built."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from apt_core.data.packing.concat import ConcatWindows
from apt_core.data.store.build import GrowingStore
from apt_core.data.store.lock import StopCheck
from apt_core.data.store.reader import TokenStore
from apt_core.log import get_logger

log = get_logger("apt.data")

RETRY_SECONDS = 0.1
START_SECONDS = 60.0
"""How long a builder that another process starts may take until it has begun."""

END_SECONDS = 5.0

LAST_BYTES = 4000


@dataclass(frozen=True)
class Found:
    """What is there of a store: ``windows`` that will stay as they are, in so many shards, whose
    hashes up to each of them are ``hashes``."""

    store: TokenStore
    windows: int
    whole: bool
    hashes: Sequence[str]

    @property
    def shards(self) -> int:
        """The shards to train on."""
        return len(self.hashes)

    @classmethod
    def of(cls, store: TokenStore, seq_len: int, *, whole: bool) -> Found:
        """What is there of ``store``."""
        tokens, digest, hashes = store.part("train").num_tokens, hashlib.sha256(), []
        for shard in store.manifest.parts["train"].shards:
            digest.update(json.dumps(shard.sha256, sort_keys=True).encode())
            hashes.append(digest.hexdigest())
        # Of a part that grows the last window has not all of its tokens yet.
        windows = len(ConcatWindows(store.part("train"), seq_len))
        return cls(store, windows if whole else max(0, tokens - 1) // seq_len, whole, hashes)


class Builder:
    """A process that builds the store in the background; it ends with this object's owner."""

    def __init__(self, command: Sequence[str]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        self._process = subprocess.Popen(
            [*command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            start_new_session=True,
        )

    @property
    def runs(self) -> bool:
        """Whether it still does."""
        return self._process.poll() is None

    def failure(self) -> str:
        """What it said at last if it failed, or an empty text."""
        if not self._process.poll():
            return ""
        end = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, end - LAST_BYTES))
        lines = self._said.read().decode(errors="replace").splitlines()
        first = next((n for n, line in enumerate(lines) if line.startswith("error:")), -1)
        return "\n".join(lines[first:]) or f"it ended with exit code {self._process.returncode}"

    def close(self) -> None:
        """End it. What it has published stays; the next one begins again."""
        if self.runs:
            self._process.terminate()
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()


class GrowingData:
    """Knows how much of a store is there, and whether more will come. With ``command`` it starts a
    builder, once, where no other process builds what is missing: at first, or later, when another
    run has ended and its builder with it. With ``patient`` another process of the run does that,
    which is waited for."""

    def __init__(
        self,
        seq_len: int,
        store: GrowingStore | None = None,
        command: Sequence[str] = (),
        patient: bool = False,
        found: Found | None = None,
    ) -> None:
        self._store, self._seq_len, self._last = store, seq_len, found
        self._command, self._patient = command, patient
        self._builder: Builder | None = None
        self._built_at = time.monotonic()

    def newest(self) -> Found | None:
        """What is there now: never less than before, though a new builder begins again."""
        last = self._last
        if last is not None and last.whole:
            return last
        known = None if self._store is None else self._store.newest()
        if known is not None:
            found = Found.of(known.store, self._seq_len, whole=known.whole)
            if last is None or found.whole or found.shards > last.shards:
                self._last = found
        return self._last

    def more_comes(self) -> bool:
        """Whether a process builds the store now."""
        if self._builder is not None and self._builder.runs:
            return True
        if self._store is None:
            return False
        if self._store.is_being_built():
            self._built_at = time.monotonic()
            return True
        found = self.newest()
        if found is not None and found.whole:
            return False
        if self._command and self._builder is None:
            self._builder = Builder(self._command)
            return True
        return self._patient and time.monotonic() - self._built_at < START_SECONDS

    def failure(self) -> str:
        """What the builder of this process said at last if it failed, or an empty text."""
        return "" if self._builder is None else self._builder.failure()

    def wait(self, check_stop: StopCheck) -> Found | None:
        """What is there as soon as anything is; None where the rest is not being built."""
        began, said = time.monotonic(), False
        while True:
            check_stop()
            # In this order: a builder that ends between the two has left the whole store.
            more = self.more_comes()
            found = self.newest()
            if found is not None and (found.whole or more):
                return found
            if not more:
                return None
            if not said and time.monotonic() - began > 1:
                log.info("waiting for the first shard of the token store")
                said = True
            time.sleep(RETRY_SECONDS)

    def close(self) -> None:
        """End the builder."""
        if self._builder is not None:
            self._builder.close()


def builder_command(words: Sequence[str]) -> list[str]:
    """The command of a process that runs ``apt-data build WORDS`` and ends with this one."""
    path = [entry for entry in sys.path if isinstance(entry, str)]
    start = (
        f"import os, sys; sys.path[:] = {path!a}; sys.argv[0] = 'apt-data'; "
        f"from apt_core.data.early import end_with; end_with({os.getpid()}); os.nice(5); "
        "from apt_core.cli.data import main; main()"
    )
    return [sys.executable, "-c", start, "build", *words]


def end_with(process: int) -> None:
    """Let this process end when its parent, ``process``, does; a signal ends it as an exception
    does, so that what it has begun is deleted."""

    def watch() -> None:
        while os.getppid() == process:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    threading.Thread(target=watch, daemon=True).start()
