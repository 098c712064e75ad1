"""``apt-new``: a profile for a budget, or the package of a plugin."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from apt_core.cli import completion
from apt_core.cli.output import say
from apt_core.cli.run_command import run_command
from apt_core.errors import ConfigError
from apt_core.profile_paths import is_url, user_path

T = TypeVar("T")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a profile for a budget of time and memory, or the package of a plugin.",
)

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there.")]

ASKED_AGAIN = 3
"""How often a question is asked whose answer is of no use."""


@app.command()
def profile(
    data: Annotated[
        list[str] | None,
        typer.Option(help="What to train on: a file, folder, pattern or URL; repeatable."),
    ] = None,
    minutes: Annotated[
        str, typer.Option(help="How long the run may take: 10 (minutes), 90s, 1.5h.")
    ] = "",
    memory: Annotated[
        str, typer.Option(help="The memory that it may take: 4GiB. Default: what is there.")
    ] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "",
    cores: Annotated[
        int | None, typer.Option(min=1, help="Cores of the CPU. Default: all that it may use.")
    ] = None,
    passes: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over the data at the most: more learn it by heart."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file. Default: DATA.yaml.")
    ] = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write a profile for a budget, measured on this machine; by questions without --data."""
    from apt_core.starting.budget import MOST_PASSES, Budget, bytes_of, minutes_of

    missing = {} if data else {"--data": "FOLDER"}
    missing |= {} if minutes else {"--minutes": "10"}
    if missing:
        require_terminal(missing)
    paths = data or [ask("What to train on (a file, folder or pattern)", _there)]
    seconds = minutes_of(minutes) if minutes else ask("Minutes that it may take", minutes_of, "10")
    if missing:
        memory = memory or ask("Memory that it may take (empty: what is there)", str.strip)
        device = device or ask("Device (auto, cpu, cuda)", str.strip, "auto")
    path = user_path(output or f"{_stem(paths[0])}.yaml")
    if path.exists() and not force:
        raise ConfigError("exists already", str(path), hint="--force replaces it")
    budget = Budget(
        data=paths,
        seconds=seconds,
        memory=bytes_of(memory) if memory else None,
        device=device or "auto",
        cores=cores,
        passes=passes or MOST_PASSES,
    )

    from apt_core.starting.profile import plan_profile, write_profile

    planned = plan_profile(budget, path.stem, say)
    write_profile(path, planned.text, force=force)
    say(
        f"\nplanned: {planned.params:,} parameters, {planned.steps:,} steps, {planned.tokens:,} "
        f"tokens, about {planned.seconds / 60:.1f} minutes ({planned.cpu_seconds / 60:.1f} of CPU "
        "time)"
    )
    for note in planned.notes:
        say(f"note: {note}")
    command = f"apt-train -p {shlex.quote(str(path))}"
    say(f"{path} written; {command} --dry-run shows its plan, {command} begins")


def _there(text: str) -> str:
    import glob

    if not (text and (is_url(text) or glob.glob(str(user_path(text))))):
        raise ConfigError(f"there is nothing at {text!r}")
    return text


def _stem(path: str) -> str:
    """The name of a profile for the data at a path."""
    stem = Path(path.rstrip("/*")).name.split(".")[0].strip("*?")
    return stem or "run"


@app.command()
def plugin(
    name: Annotated[str, typer.Argument(help="The plugin's name: letters, digits, _.")] = "",
    kind: Annotated[
        str,
        typer.Option(
            help="hook (observes), tracker, loss, attention, ffn or data.",
            autocompletion=completion.package_kinds,
        ),
    ] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder. Default: ./NAME.")
    ] = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write the package of a plugin: code, tests that pass, tox.ini; by questions without NAME."""
    from apt_core.starting.plugin_package import (
        PACKAGE_KINDS,
        checked_name,
        plugin_package,
        write_package,
    )

    if not name:
        require_terminal({"NAME": ""})
        name = ask("The plugin's name", checked_name)
        kinds = ", ".join(f"{each} ({does})" for each, does in PACKAGE_KINDS.items())
        kind = kind or ask(f"Kinds are {kinds}.\nThe kind", _known_kind, "hook")
    name = checked_name(name)
    files = plugin_package(name, kind or "hook")
    folder = user_path(output or name)
    write_package(folder, files, force=force)
    for path in files:
        say(f"{folder / path}")
    say(f"\ncd {folder} && tox            # runs its tests in an environment of their own")
    say(f"pip install -e {folder} && apt-hooks check {name}")


def _known_kind(kind: str) -> str:
    from apt_core.starting.plugin_package import PACKAGE_KINDS

    if kind not in PACKAGE_KINDS:
        raise ConfigError(f"kinds are {', '.join(PACKAGE_KINDS)}")
    return kind


def is_terminal() -> bool:
    """Whether somebody is there to be asked."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def require_terminal(missing: dict[str, str]) -> None:
    """Raise ConfigError for what is ``missing`` where nobody can be asked for it; values are
    examples."""
    if is_terminal():
        return
    words = [f"{option} {example}".strip() for option, example in missing.items()]
    hint = f"give {' '.join(words)}; there is no terminal to ask at"
    raise ConfigError(
        f"{', '.join(missing)} {'is' if len(words) == 1 else 'are'} missing", hint=hint
    )


def ask(question: str, convert: Callable[[str], T], default: str = "") -> T:
    """The answer to a question, asked again where ``convert`` raises ConfigError. Raises that in
    the end, and for the end of the input."""
    for left in range(ASKED_AGAIN, 0, -1):
        shown = f" [{default}]" if default else ""
        say(f"{question}{shown}: ", end="")
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            raise ConfigError("the input has ended")
        try:
            return convert(line.strip() or default)
        except ConfigError as error:
            if left == 1:
                raise
            say(error)
    raise AssertionError


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``apt-new``."""
    sys.exit(run_command(app, "apt-new", args))
