"""How every command starts and ends: arguments, errors as one readable block, exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from apt_core import __version__
from apt_core.cli.output import Json, complain, give_up, json_text, open_streams, output_apart
from apt_core.error_text import one_line, text_of
from apt_core.errors import AptError, ConfigError, PluginError, ProviderError

if TYPE_CHECKING:
    import typer


UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def run_command(app: typer.Typer, prog: str, args: Sequence[str] | None = None) -> int:
    """Run a typer app; returns the exit code.

    0 fine, 1 the run failed, 2 bad input, 128 + its number after a signal. Errors go to stderr,
    without a traceback unless ``--debug`` is among the arguments. With ``--json`` all that is
    printed goes there, apart from the answer; a command of a class with ``keeps_apart``, which
    writes its answer part by part, sees to that itself.
    """
    # pydantic asks every installed distribution for plugins of its own: that takes as long as a
    # listing, and one that is damaged ends it.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    import typer.main

    from apt_core.cli.completion import INSTALL, SHOW, asked_of, complete, install_or_show

    arguments = list(sys.argv[1:] if args is None else args)
    command = typer.main.get_command(app)
    command.epilog = (
        "--version shows the versions of APT and of its libraries; --install-completion [SHELL] "
        "lets a shell complete all commands, --show-completion [SHELL] prints how."
    )
    if instruction := asked_of(prog, os.environ):
        return end_of(lambda: complete(command, prog, instruction), prog, arguments)
    if arguments and arguments[0] in (INSTALL, SHOW):
        return end_of(lambda: install_or_show(arguments), prog, arguments)
    if not arguments and hasattr(command, "commands"):
        arguments = ["--help"]
    if arguments == ["--version"]:
        return end_of(show_versions, prog, arguments)
    return end_of(lambda: _invoke(command, prog, arguments), prog, arguments)


def show_versions() -> int:
    """Print what a report of a fault has to name."""
    import platform
    from importlib import metadata

    versions = [f"Python {platform.python_version()}"]
    for name in ("torch", "pluggy"):
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    print(f"APT {__version__} ({', '.join(versions)})")
    return 0


def _invoke(command: Any, prog: str, args: list[str]) -> int:
    import typer

    apart = "--json" in args and not getattr(command, "keeps_apart", False)
    # Not main(): it turns Ctrl-C and a reader that went away into exits of its own.
    try:
        with (
            output_apart() if apart else nullcontext(),
            command.make_context(prog, list(args)) as context,
        ):
            result = command.invoke(context)
            text = json_text(result.value) if isinstance(result, Json) else None
    except typer.Exit as end:
        return end.exit_code
    if text is not None:
        open_streams()
        print(text)
        return int(result.exit_code)
    return result if isinstance(result, int) else 0


def end_of(command: Callable[[], int], prog: str, args: Sequence[str]) -> int:
    """The exit code of what a command does, whatever it raises; errors are reported on stderr."""
    open_streams()
    place = place_among_processes()
    try:
        code = command()
        open_streams()  # a plugin may have closed them
        sys.stdout.flush()
        return code
    except AptError as error:
        return _report(error, args, error.exit_code, place)
    except KeyboardInterrupt as interrupt:
        if not place[1]:
            complain("interrupted")
        return getattr(interrupt, "exit_code", 128 + signal.SIGINT)
    except BrokenPipeError:
        give_up(sys.stdout)  # the reader went away
        return 0
    except GeneratorExit as error:
        return _report(RuntimeError(f"GeneratorExit was raised: {error}"), args, 1, place)
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is not None:
            return _report(ConfigError(f"{usage()} (see {prog} --help)"), args, 2, place)
        return _report(_explained(error), args, 1, place)


def _explained(error: Exception) -> Exception:
    """An error of the surroundings in words, where it is one."""
    if not isinstance(error, OSError) or error.filename is not None:
        return error
    if error.errno == errno.ENOENT:
        try:
            os.getcwd()
        except FileNotFoundError:
            hint = "cd to another"
            return ConfigError("the working directory has been removed", hint=hint)
    elif error.errno in UNWRITABLE:
        try:
            sys.stdout.flush()
            os.write(1, b"\n")
        except OSError as unwritable:
            give_up(sys.stdout)
            return AptError(f"the output cannot be written: {unwritable.strerror}")
    return error


def place_among_processes() -> tuple[bool, int]:
    """Whether --nproc or torchrun has started several processes, and the rank of this one."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    rank = os.environ.get("RANK", "0")
    return several, int(rank) if several and rank.isdigit() else 0


def _report(error: Exception, args: Sequence[str], code: int, place: tuple[bool, int]) -> int:
    several, rank = place
    if several and _already_reported(error, rank):
        return code
    # A failure in one of many processes can seldom be reproduced, so show its traceback.
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
    complain(lines, end="")
    return error.exit_code if isinstance(error, AptError) else code


def ignore_termination() -> None:
    """Let this process report why it ends: whoever started the processes of a run terminates all
    of them when the first one has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _already_reported(error: Exception, rank: int) -> bool:
    from apt_core.parallel.launch import already_reported

    ignore_termination()
    return already_reported(f"{type(error).__name__}: {error}", rank)
