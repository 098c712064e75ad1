"""Completion of what is typed into a shell: options, profiles, plugins, runs, keys of the profile.

A shell starts the command again at every press of the tab key, so that nothing here imports torch,
and the keys, which the whole schema is read for, are kept in the cache. A completion that fails
completes nothing: a message would be printed into what somebody is typing.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from apt_core.cache import cache_dir
from apt_core.errors import AptError, ConfigError
from apt_core.profile_paths import RUNS, SUFFIXES, list_profiles

INSTALL, SHOW = "--install-completion", "--show-completion"
SHELLS = ("bash", "zsh", "fish")
MOST_RUNS = 100
"""Newest runs that are completed by their folders."""

Completer = Callable[[str], list[str]]


def completing(complete: Callable[[str], Iterable[str]]) -> Completer:
    """Make a completer of a function that gives all that it knows: it keeps what begins with what
    was typed, and gives nothing where it fails."""

    @wraps(complete)
    def completed(incomplete: str) -> list[str]:
        try:
            # Beside the completions, which come later, what is printed would go into the line that
            # somebody is typing.
            with (
                open(os.devnull, "w") as nowhere,
                redirect_stdout(nowhere),
                redirect_stderr(nowhere),
            ):
                return [text for text in complete(incomplete) if text.startswith(incomplete)]
        except Exception:
            return []

    # The type hints of the original, which typer evaluates, are those of this function.
    completed.__annotations__ = {"incomplete": str, "return": list}
    del completed.__wrapped__
    return completed


@completing
def profiles(incomplete: str) -> Iterator[str]:
    """Profiles by name, and the files and folders that a path leads to."""
    yield from list_profiles()
    yield from _paths(incomplete, SUFFIXES)


@completing
def plugins(incomplete: str) -> Iterator[str]:
    """Installed plugins, with ``no:`` before them where that was typed, and ``.py`` files; after a
    comma the next one."""
    from apt_core.discovery import installed_plugins

    before, comma, last = incomplete.rpartition(",")
    no = "no:" if last.startswith("no:") else ""
    for name in (*installed_plugins(), *(() if no else _paths(last, (".py",)))):
        yield f"{before}{comma}{no}{name}"


@completing
def runs(incomplete: str) -> Iterator[str]:
    """The profiles that have runs, the newest runs by their folders, and other folders."""
    found = [path.parent for path in RUNS.glob("*/*/manifest.json")]
    found.sort(key=lambda path: path.name, reverse=True)
    yield from sorted({path.parent.name for path in found})
    yield from map(str, found[:MOST_RUNS])
    yield from (str(path.parent) for path in RUNS.glob("*/manifest.json"))
    yield from _paths(incomplete, ())


@completing
def assignments(incomplete: str) -> Iterator[str]:
    """Keys of the profile, for ``--set KEY=VALUE``."""
    return (f"{key}=" for key in known_keys())


@completing
def keys(incomplete: str) -> Iterator[str]:
    """Keys and sections of the profile."""
    known = known_keys()
    yield from dict.fromkeys([*known, *(key.rpartition(".")[0] for key in known if "." in key)])


@completing
def key_options(incomplete: str) -> Iterator[str]:
    """Keys of sections as options."""
    return (f"--{key}" for key in known_keys() if "." in key)


@completing
def kinds(incomplete: str) -> Iterable[str]:
    """Kinds of providers."""
    from apt_core.kinds import KINDS

    return KINDS


@completing
def package_kinds(incomplete: str) -> Iterable[str]:
    """Kinds of packages that ``apt-new plugin`` writes."""
    from apt_core.starting.plugin_package import PACKAGE_KINDS

    return PACKAGE_KINDS


@completing
def hooks(incomplete: str) -> Iterable[str]:
    """Names of hooks."""
    from apt_core.hookspecs import POLICIES

    return POLICIES


def _paths(incomplete: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Folders, each with a slash, and files with one of these suffixes, as far as they are
    typed."""
    parent = os.path.dirname(incomplete)
    with suppress(OSError), os.scandir(os.path.expanduser(parent) or ".") as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = os.path.join(parent, entry.name)
            if entry.name.startswith(".") and not os.path.basename(incomplete).startswith("."):
                continue
            if entry.is_dir():
                yield f"{path}/"
            elif entry.name.endswith(suffixes) and suffixes:
                yield path


class KeysAreOptions(TyperCommand):
    """A command that takes every key of the profile as an option: ``--model.d_model 64``."""

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("--"):
            item = type(super().shell_complete(ctx, "--")[0])  # each typer has a class of its own
            found += [item(name) for name in key_options(incomplete)]
        return found


# Keys of the profile ----------------------------------------------------------------------------


def known_keys() -> list[str]:
    """Every key of the profile by its dotted name, those of installed plugins too; from the cache
    where the same are installed as when it was written."""
    from apt_core.json_files import read_json

    mark = _mark()
    file = None
    with suppress(OSError):
        file = cache_dir() / "completion.json"
    if file is not None:
        with suppress(OSError, ValueError):
            kept = read_json(file)
            if isinstance(kept, dict) and kept.get("of") == mark and _are_texts(kept.get("keys")):
                return list(kept["keys"])
    from apt_core.config import all_keys
    from apt_core.inspect.listing import survey

    found = all_keys(survey().sections)
    if file is not None:
        with suppress(OSError):
            from apt_core.cli.output import json_text
            from apt_core.files import write_atomically

            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json_text({"of": mark, "keys": found}))
    return found


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _mark() -> list[Any]:
    """What the keys depend on: the installed plugins, and the age of the core's code."""
    from apt_core import __version__
    from apt_core.discovery import installed_plugins

    folder = Path(__file__).resolve().parents[1] / "config"
    ages = [os.stat(path).st_mtime_ns for path in (folder, folder / "schema.py")]
    plugins = [[p.name, p.dist, p.version] for p in installed_plugins().values()]
    return [__version__, *ages, plugins]


# Shells -----------------------------------------------------------------------------------------


def variable(prog: str) -> str:
    """The environment variable by which a shell asks the command ``prog`` for completions."""
    return f"_{prog.replace('-', '_').upper()}_COMPLETE"


def asked_of(prog: str, environment: MutableMapping[str, str]) -> str:
    """What a shell asks the command for, such as ``complete_bash``; empty if none does."""
    return environment.get(variable(prog), "")


def complete(command: Any, prog: str, instruction: str) -> int:
    """Print the completions that a shell asks for."""
    shells = _of_typer()
    shells.completion_init()
    return int(shells.shell_complete(command, {}, prog, variable(prog), instruction))


def _of_typer() -> Any:
    """typer's module of completion, which does not declare what it offers."""
    return import_module("typer.completion")


def script(shell: str) -> str:
    """The script that makes ``shell`` complete every command of APT and of installed plugins.
    Raises ConfigError for a shell that is not known."""
    if shell not in SHELLS:
        message = (
            f"completion is not known for the shell {shell!r}"
            if shell
            else ("the shell that is used cannot be told")
        )
        raise ConfigError(message, SHOW, hint=f"name one of {', '.join(SHELLS)}: {SHOW} bash")
    scripts = [
        _of_typer().get_completion_script(prog_name=prog, complete_var=variable(prog), shell=shell)
        for prog in commands()
    ]
    return "\n\n".join(scripts)


def commands() -> list[str]:
    """The names of all commands."""
    from apt_core.cli.verbs import PREFIX, VERBS, WITHOUT_COMMAND
    from apt_core.discovery import COMMAND_GROUP, installed_plugins

    own = [f"{PREFIX}{verb}" for verb in VERBS if verb not in WITHOUT_COMMAND]
    return sorted({*own, *installed_plugins(COMMAND_GROUP)})


def this_shell() -> str:
    """The shell that has started this process; empty if that cannot be told."""
    try:
        return str(import_module("shellingham").detect_shell()[0])
    except Exception:  # it is an optional part of some versions of typer
        return os.path.basename(os.environ.get("SHELL", ""))


def install(shell: str) -> list[Path]:
    """Let ``shell`` read the script when it starts; the files that were written. Raises AptError
    where they cannot be, ConfigError as :func:`script` does."""
    text = script(shell)
    home = Path(os.path.expanduser("~"))
    places = {
        "bash": (home / ".bash_completions" / "apt.sh", home / ".bashrc", "source {}"),
        "zsh": (
            home / ".zfunc" / "apt.zsh",
            home / ".zshrc",
            "autoload -Uz compinit && compinit && source {}",
        ),
        "fish": (home / ".config" / "fish" / "conf.d" / "apt.fish", None, ""),
    }
    file, start, line = places[shell]
    line = line.format(shlex.quote(str(file)))
    written = [file]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n", encoding="utf-8")
        if start is not None:
            there = start.read_bytes() if start.exists() else b""
            if line.encode() not in there.splitlines():
                end = b"" if not there or there.endswith(b"\n") else b"\n"
                with open(start, "ab") as opened:
                    opened.write(end + line.encode() + b"\n")
                written.append(start)
    except OSError as error:
        raise AptError(
            f"completion cannot be installed: {file}: {error.strerror or error}\n"
            f"write the script yourself: {SHOW} {shell} > FILE, and let the shell source FILE"
        ) from error
    return written


def install_or_show(arguments: list[str]) -> int:
    """Do what ``--install-completion [SHELL]`` or ``--show-completion [SHELL]`` asks for."""
    from apt_core.cli.output import say

    option, *rest = arguments
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}", option)
    shell = (rest[0] if rest else this_shell()).lower()
    if option == SHOW:
        say(script(shell))
        return 0
    written = install(shell)
    say(f"completion of {', '.join(commands())} by {shell} is in {written[0]}")
    for changed in written[1:]:
        say(f"{changed} reads it")
    say("it takes effect in the next shell")
    return 0
