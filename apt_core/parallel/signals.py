"""Handles the signals that ask a process to end: the first one at the next safe point, the second
one at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from apt_core.errors import Interrupted


@contextmanager
def handling(
    numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Call ``handler`` for these signals while the context lasts. One that is ignored stays
    ignored, as nohup wants.

    Does nothing outside the main thread, where Python cannot handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in caught}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


SAME_SECONDS = 2.0
"""A process of several may get a signal from its launcher and from the launcher's sender: signals
this close together count as one."""


class Interrupts:
    """Records the first signal that asks to stop as ``received``; None before it. ``alone``
    says that the run has one process."""

    def __init__(self, *, alone: bool = True) -> None:
        self.received: signal.Signals | None = None
        self._same_until = 0.0
        self._same_seconds = 0.0 if alone else SAME_SECONDS

    def __bool__(self) -> bool:
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number (130 for SIGINT, 143 for SIGTERM), or 0 without one."""
        return 0 if self.received is None else 128 + int(self.received)

    def require_none(self) -> None:
        """Raise the KeyboardInterrupt of the signal, if one was received: for what comes before the
        first step, where there is nothing to save. Who started the processes of a run signals them
        when one of them has failed."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            self._same_until = time.monotonic() + self._same_seconds
        elif time.monotonic() >= self._same_until:
            raise Interrupted(number)

    def listening(self) -> AbstractContextManager[None]:
        """Catch SIGINT, SIGTERM and SIGHUP while the context lasts."""
        return handling((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), self._handle)
