"""Stopping on a signal: the first one asks, at the next safe point; the second one insists."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """``received`` is the signal that asked the run to stop, or None."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + int(self.received or signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGINT, SIGTERM and, where there is one, SIGHUP while the context lasts.

        Only in the main thread: elsewhere Python has no signals.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        caught = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP"):
            caught.append(signal.SIGHUP)
        # What is ignored stays so: that is what nohup is for.
        caught = [number for number in caught if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
