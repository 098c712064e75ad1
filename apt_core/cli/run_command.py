"""How every command starts and ends: arguments, errors as one readable block, exit codes."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from apt_core.errors import AptError, ConfigError, PluginError, ProviderError
from apt_core.failures import one_line, text_of

if TYPE_CHECKING:
    import typer


def run_command(app: typer.Typer, prog: str, args: Sequence[str] | None = None) -> int:
    """Run a typer app; returns the exit code.

    0 fine, 1 the run failed, 2 bad input, 128 + its number after a signal. Errors go to stderr,
    without a traceback unless ``--debug`` is among the arguments.
    """
    # pydantic asks every installed distribution for plugins of its own: that takes as long as a
    # listing, and one that is damaged ends it.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    import typer.main

    args = list(sys.argv[1:] if args is None else args)
    command = typer.main.get_command(app)
    if not args and hasattr(command, "commands"):
        args = ["--help"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        # Not main(): it turns Ctrl-C and a reader that went away into exits of its own.
        with command.make_context(prog, list(args)) as context:
            result = command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as end:
        return end.exit_code
    except AptError as error:
        return _report(error, args, error.exit_code)
    except KeyboardInterrupt as interrupt:
        if not place_among_processes()[1]:
            print("interrupted", file=sys.stderr)
        return getattr(interrupt, "exit_code", 128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader went away; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except GeneratorExit as error:
        return _report(RuntimeError(f"GeneratorExit was raised: {error}"), args, 1)
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is not None:
            return _report(ConfigError(f"{usage()} (see {prog} --help)"), args, 2)
        return _report(error, args, 1)
    return result if isinstance(result, int) else 0


def place_among_processes() -> tuple[bool, int]:
    """Is this one of several processes of a run, which --nproc or torchrun starts, and which?"""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    rank = os.environ.get("RANK", "0")
    return several, int(rank) if several and rank.isdigit() else 0


def _report(error: Exception, args: Sequence[str], code: int) -> int:
    several, rank = place_among_processes()
    if several and _is_said(error, rank):
        return code
    # What failed in one of many processes can seldom be had again.
    foreign = not isinstance(error, AptError) or isinstance(error, PluginError | ProviderError)
    whole = "--debug" in args or (several and foreign)
    text = (
        text_of(error) if isinstance(error, AptError) else f"unexpected failure: {one_line(error)}"
    )
    lines = "".join(traceback.format_exception(error)) if whole else ""
    lines += f"error: {text}\n"
    if not whole and not isinstance(error, ConfigError):
        lines += "(add --debug for the traceback)\n"
    if rank:
        lines = "".join(f"process {rank}: {line}\n" for line in lines.splitlines())
    # In one piece, so that the lines of processes do not mix.
    print(lines, end="", file=sys.stderr, flush=True)
    return code


def _is_said(error: Exception, rank: int) -> bool:
    from apt_core.training.launch import is_said

    # Whoever started the processes ends them all when the first has ended.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return is_said(f"{type(error).__name__}: {error}", rank)


def print_json(value: Any) -> None:
    """One JSON document on the process's stdout, non-ASCII text as it is."""
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A plain table on stdout; in a pipe nothing is cut off or wrapped."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
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
