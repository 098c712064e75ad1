"""What commands print: lines, tables and JSON on the standard streams, in any state of these."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from apt_core.printable import printable

if TYPE_CHECKING:
    from rich.console import Console


KEPT = "\n\t\u200c\u200d"
"""Characters of a model's text that a terminal gets as they are, beside those that are printable:
writing systems that join letters need them."""


@dataclass(frozen=True)
class Json:
    """What a command answers with ``--json``: printed when nothing else can be any more."""

    value: Any
    exit_code: int = 0


def open_streams() -> None:
    """Open what the process was started without, to nowhere: the next file that is opened would be
    its standard output; and what somebody has closed since, to where it led. Text that a stream's
    encoding does not have is written as escapes."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)  # as standard streams are
        if not _is_open(getattr(sys, name)):
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")


def _is_open(stream: Any) -> bool:
    try:
        return stream is not None and not getattr(stream, "closed", False)
    except ValueError:  # its buffer has been detached
        return False


def give_up(stream: TextIO) -> None:
    """Let a stream that nobody can take lead nowhere, so that the end of the interpreter does not
    fail at it."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextmanager
def output_apart() -> Iterator[TextIO]:
    """While the context lasts, what is written to stdout goes to stderr, also by those who know it
    by its descriptor (C libraries, child processes): stdout is for the answer, and is what the
    context gives."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = os.dup(1)
    stdout = _on(kept, sys.stdout)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield stdout
    finally:
        if stdout is not sys.stdout:
            with suppress(OSError, ValueError):
                stdout.close()  # whoever writes to it flushes it
        open_streams()
        sys.stderr.flush()
        if "ctypes" in sys.modules:  # as whatever has code in C brings along
            sys.modules["ctypes"].CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _on(descriptor: int, stream: TextIO) -> TextIO:
    """A stream like ``stream``, which is the standard output, on its duplicated descriptor; one
    that has another or none as it is."""
    try:
        if stream.fileno() != 1:
            return stream
    except (OSError, ValueError):
        return stream
    return open(descriptor, "w", encoding=stream.encoding, errors="backslashreplace", closefd=False)


def say(text: object = "", *, end: str = "\n", file: IO[str] | None = None) -> None:
    """Print text that may hold anything, on stdout or another file."""
    open_streams()
    print(printable(str(text)), end=end, file=file)


def complain(text: object, *, end: str = "\n") -> None:
    """Print on stderr, in one piece; where nobody can take that, it is lost."""
    open_streams()
    try:
        print(printable(str(text)) + end, end="", file=sys.stderr, flush=True)
    except OSError:
        give_up(sys.stderr)


def json_text(value: Any, *, indent: int | None = 2, stream: TextIO | None = None) -> str:
    """One JSON document, on one line without ``indent``; text that is not ASCII as it is, where
    ``stream``, by default stdout, takes it."""
    import json

    encoding = getattr(stream or sys.stdout, "encoding", "") or ""
    unicode = encoding.lower().replace("-", "") == "utf8"
    text = json.dumps(value, indent=indent, ensure_ascii=not unicode, default=str)
    # Lone surrogates, of file names that are no UTF-8, become the escapes that JSON has for them.
    return text.encode("utf-8", errors="backslashreplace").decode()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A plain table on stdout; in a pipe nothing is cut off or wrapped."""
    open_streams()
    cells = [["" if cell is None else printable(str(cell), "") for cell in row] for row in rows]
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for row in (columns, *cells):
            padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(padded).rstrip())
        return

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)


def make_console(stream: TextIO) -> Console:
    """A console on ``stream`` that prints text which may hold anything."""
    from rich.console import Console, ConsoleRenderable, RenderHook
    from rich.segment import Segment

    class Printable:
        def __init__(self, inner: ConsoleRenderable) -> None:
            self._inner = inner

        def __rich_console__(self, console: Console, options: Any) -> Iterator[Segment]:
            for segment in console.render(self._inner, options):
                if segment.control:
                    yield segment
                else:
                    yield Segment(printable(segment.text), segment.style)

    class Hook(RenderHook):
        def process_renderables(
            self, renderables: list[ConsoleRenderable]
        ) -> list[ConsoleRenderable]:
            return [cast(ConsoleRenderable, Printable(inner)) for inner in renderables]

    # Colours may be forced in a pipe, where a display that redraws itself is a flood.
    redraws = None if stream.isatty() else False
    console = Console(file=stream, highlight=False, soft_wrap=True, force_interactive=redraws)
    console.push_render_hook(Hook())
    return console
