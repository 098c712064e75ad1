"""Logging of a run: plain lines on the console, everything in the run folder's ``log.txt``.

Every part of APT logs to a child of the logger ``apt``; plugins may do the same. A process may make
several runs, in turns too: what one of them logs does not reach the files of another.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from io import BufferedWriter, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from apt_core.files import append_to_file, was_replaced
from apt_core.printable import printable

if TYPE_CHECKING:
    from rich.console import Console


class KernelLogger(logging.Logger):
    """A logger whose calls do not raise errors of foreign handlers, filters or record factories,
    and still call the other handlers. Such an error is passed to the ``note`` of
    :func:`of_one_run`, or printed as logging does. The console and the files of :func:`logging_to`
    get its records even if logging was reconfigured or filtered by others."""

    def isEnabledFor(self, level: int) -> bool:
        return bool(_own) or super().isEnabledFor(level)

    def makeRecord(self, *args: Any, **options: Any) -> logging.LogRecord:
        try:
            return super().makeRecord(*args, **options)
        except BaseException as error:
            _note(error)
            name, level, file, line, message, values, exc_info = args[:7]
            return logging.LogRecord(name, level, file, line, message, values, exc_info)

    def handle(self, record: logging.LogRecord) -> None:
        for handler in list(_own):
            _hand_to(handler, record)
        if self.disabled or not super().isEnabledFor(record.levelno):
            return
        kept: Any = True
        try:
            kept = self.filter(record)
        except BaseException as error:
            _note(error)
        if kept:
            self.callHandlers(kept if isinstance(kept, logging.LogRecord) else record)

    def callHandlers(self, record: logging.LogRecord) -> None:
        place: logging.Logger | None = self
        found = False
        while place is not None:
            for handler in list(place.handlers):
                found = True
                if handler not in _own:
                    _hand_to(handler, record)
            place = place.parent if place.propagate else None
        if not (found or _own) and logging.lastResort is not None:
            super().callHandlers(record)


_own: list[logging.Handler] = []
"""The handlers of the kernel, while they are installed."""


def _hand_to(handler: logging.Handler, record: logging.LogRecord) -> None:
    try:
        if record.levelno >= handler.level:
            handler.handle(record)
    except BaseException as error:
        _note(error)


_RUN: ContextVar[object | None] = ContextVar("run", default=None)
"""The object of the run that logs; None outside of runs, and in threads that have no context of a
run."""


def _concerns(owner: object | None) -> bool:
    """Whether the present record belongs to the run ``owner``, or to no run."""
    run = _RUN.get()
    return owner is None or run is None or run is owner


_noting: list[tuple[object | None, Callable[[BaseException], None]]] = []


def _note(error: BaseException) -> None:
    if isinstance(error, KeyboardInterrupt):
        raise error
    if notes := [note for owner, note in _noting if _concerns(owner)]:
        notes[-1](error)
    elif logging.raiseExceptions and sys.stderr is not None:
        traceback.print_exception(error)


@contextmanager
def of_one_run(note: Callable[[BaseException], None] | None = None) -> Iterator[None]:
    """Attribute records logged in this context (a contextvars one) to one run. Errors of foreign
    code in its log calls are passed to ``note``, or printed."""
    run = object()
    noting = [(run, note)] if note is not None else []
    token = _RUN.set(run)
    _noting.extend(noting)
    try:
        yield
    finally:
        for entry in noting:
            _noting.remove(entry)
        _RUN.reset(token)


def get_logger(name: str) -> logging.Logger:
    """A logger of the kernel's own, ``apt`` or below it."""
    logger = logging.getLogger(name)
    if type(logger) is logging.Logger:
        logger.__class__ = KernelLogger
    return logger


ROOT = get_logger("apt")


def _add(handler: logging.Handler) -> None:
    owner = _RUN.get()
    handler.addFilter(lambda record: _concerns(owner))
    _own.append(handler)
    ROOT.addHandler(handler)  # for the loggers of plugins, which are below it


def _take_away(handler: logging.Handler) -> None:
    ROOT.removeHandler(handler)
    with suppress(ValueError):
        _own.remove(handler)


_listening: list[bool] = []
"""Whether each context that takes records has a console. Runs in turns may end in any order;
logging is restored after the last one."""
_before: list[tuple[int, bool]] = []


@contextmanager
def _taking_records(*, on_console: bool = False) -> Iterator[None]:
    if not _listening:
        _before[:] = [(ROOT.level, ROOT.propagate)]
    _listening.append(on_console)
    ROOT.setLevel(logging.DEBUG)
    ROOT.propagate = _before[0][1] and not any(_listening)
    try:
        yield
    finally:
        _listening.remove(on_console)
        level, propagate = _before[0]
        ROOT.propagate = propagate and not any(_listening)
        if not _listening:
            ROOT.setLevel(level)


class TolerantStream:
    """A text stream that drops its output when it can no longer be written, so that a run outlives
    its terminal or pipe. If other code closes or detaches the stream, its descriptor is still
    used."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._dead = False
        self.encoding = stream.encoding
        self._descriptor = -1
        with suppress(OSError, ValueError):
            self._descriptor = stream.fileno()

    def write(self, text: str) -> int:
        return self._attempt(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._attempt(lambda: self._stream.flush())

    def _attempt(self, action: Callable[[], int | None]) -> int:
        if self._dead:
            return 0
        try:
            return action() or 0
        except OSError:
            self._dead = True
        except ValueError:
            self._dead = not self._reopened()
            return self._attempt(action)
        return 0

    def _reopened(self) -> bool:
        try:
            if not self._stream.closed:
                return False
        except ValueError:  # detached
            pass
        try:
            self._stream = open(  # noqa: SIM115
                self._descriptor,
                "w",
                buffering=1,
                encoding=self.encoding,
                errors="backslashreplace",
                closefd=False,
            )
        except (OSError, ValueError):
            return False
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class PrintableFormatter(logging.Formatter):
    """Formats lines for a file or a terminal, with unprintable characters of plugins and file names
    escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class ConsoleHandler(logging.Handler):
    """Prints records through a rich console, so that lines and a live display do not mix."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.setFormatter(PrintableFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        styles = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}
        try:
            text = self.format(record)
            if record.levelno >= logging.WARNING:
                text = f"{record.levelname.lower()}: {text}"
            style = styles.get(record.levelno)
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        except Exception:
            self.handleError(record)


class LogFile(logging.FileHandler):
    """Appends records to a file. If the disk is full, records are lost, which is reported once, and
    the run goes on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self._lacking = False

    def _open(self) -> TextIOWrapper:
        file = append_to_file(Path(self.baseFilename))
        return TextIOWrapper(BufferedWriter(file), encoding="utf-8", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._reopen_if_moved()
            super().emit(record)
        except OSError:  # the file cannot be made
            self.handleError(record)

    def _reopen_if_moved(self) -> None:
        """Open the file again if it was moved or deleted: records written to it would be lost."""
        if self.stream is not None and was_replaced(self.stream, self.baseFilename):
            self.stream.close()
            self.stream = None

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._lacking:
            self._lacking = True
            # For the console only: this handler would fail again.
            get_logger("apt.training").error(
                "%s is incomplete: %s", Path(self.baseFilename).name, error
            )

    def close(self) -> None:
        with suppress(OSError):  # the buffered records still do not fit
            super().close()


class Backlog(logging.Handler):
    """Keeps what is logged before a run has its folder."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def pour_into(self, handler: logging.Handler) -> None:
        """Pass the kept records on to the handlers, and keep no more."""
        for record in self.records:
            if record.levelno >= handler.level:
                handler.handle(record)
        self.drop()

    def drop(self) -> None:
        """Drop the kept records, and keep no more."""
        _take_away(self)
        self.records.clear()


@contextmanager
def keeping_backlog() -> Iterator[Backlog]:
    """Keep records from now on until they are passed on or dropped."""
    backlog = Backlog()
    with _taking_records():
        _add(backlog)
        try:
            yield backlog
        finally:
            _take_away(backlog)


@contextmanager
def logging_to(
    console: Console | None = None,
    *,
    file: Path | None = None,
    level: str = "INFO",
    backlog: Backlog | None = None,
) -> Iterator[None]:
    """Log what is at least of ``level`` to a console, a file or both while the context lasts.

    The file is appended to, with times and levels; ``backlog`` goes into it first.
    """
    handlers: list[logging.Handler] = []
    if console is not None:
        shown = ConsoleHandler(console)
        shown.setLevel(level)
        handlers.append(shown)
    if file is not None:
        written = LogFile(file)
        written.setLevel(level)
        written.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        if backlog is not None:
            backlog.pour_into(written)
        handlers.append(written)
    with _taking_records(on_console=console is not None):
        for handler in handlers:
            _add(handler)
        try:
            yield
        finally:
            for handler in handlers:
                _take_away(handler)
                handler.close()
