"""``apt-train``: train what a profile describes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer

from apt_core.cli.run_command import print_json, run_command
from apt_core.errors import ConfigError, Problem, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from apt_core.config import Override
    from apt_core.kernel import Kernel

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    profile: Annotated[
        str,
        typer.Option(
            "--profile", "-p", help="A path, or a name in ./profiles or among the installed ones."
        ),
    ] = "",
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            help="Activate a plugin: a name, a dotted module or a .py file; repeatable, comma "
            "lists allowed. no:NAME leaves one out."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The run's folder. Default: runs/PROFILE/TIME."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the newest checkpoint in the run's folder.")
    ] = False,
    resume_from: Annotated[
        Path | None, typer.Option(help="Go on from this checkpoint or run folder.")
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Any plugin failure, fallback or inactive key is an error."),
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a key: training.max_epochs=5. Also --section.key V."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and train nothing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="The dry run's plan as JSON.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and debug messages.")
    ] = False,
) -> int:
    """Train a language model as a profile says.

    Keys of the profile are options too: --model.attention_name flash_v2
    """
    options = [name for parameter in context.command.params for name in parameter.opts]
    overrides = collect_overrides(set_ or (), context.args, options)
    if not profile:
        raise ConfigError(
            Problem("no profile was given", hint="apt-train --profile tiny_debug; see --help")
        )
    if resume and resume_from is not None:
        raise ConfigError(
            Problem("--resume and --resume-from exclude each other", hint="give one of them")
        )
    if json and not dry_run:
        raise ConfigError(Problem("--json goes with --dry-run"))

    from rich.console import Console

    from apt_core.kernel import boot
    from apt_core.log import TolerantStream, logging_to

    stream = TolerantStream(sys.stderr if json else sys.stdout)
    console = Console(file=cast(TextIO, stream), highlight=False, soft_wrap=True)
    # What a plugin prints must not end up in the JSON of a plan.
    apart = redirect_stdout(sys.stderr) if json else nullcontext()
    with logging_to(console, level="DEBUG" if debug else "INFO"), apart:
        kernel = boot(
            profile, plugins=plugin or (), overrides=overrides, strict=strict, files=not dry_run
        )
        if dry_run:
            from apt_core.training.plan import make_plan, print_plan

            plan = make_plan(kernel)
            if not json:
                print_plan(console, plan)
        else:
            return run(
                kernel,
                console,
                again=_command(profile, plugin or (), set_ or (), strict, context.args),
                output=output,
                resume=resume,
                resume_from=resume_from,
            )
    if json:
        print_json(plan)
    return 0


def _command(
    profile: str, plugins: Sequence[str], assignments: Sequence[str], strict: bool, rest: list[str]
) -> str:
    """The command of a run without its folder: what going on with it takes."""
    words = ["apt-train", "--profile", profile]
    for plugin in plugins:
        words += ["--plugin", plugin]
    for assignment in assignments:
        words += ["--set", assignment]
    return shlex.join([*words, *["--strict"] * strict, *rest])


def run(kernel: Kernel, console: Console, *, again: str, **options: Any) -> int:
    """Train and print the closing summary; returns the exit code."""
    console.print(f"profile {kernel.config.name} loaded", markup=False)

    from apt_core.training import Trainer
    from apt_core.training.summary import print_summary, resume_hint

    trainer = Trainer(kernel, console=console, **options)
    try:
        result = trainer.fit()
    except BaseException:
        hint = resume_hint(trainer, again)
        if hint:
            print(hint, file=sys.stderr)
        raise
    print_summary(console, result, kernel)
    if result.status == "interrupted":
        console.print(resume_hint(trainer, again), markup=False)
    return result.exit_code


def collect_overrides(
    assignments: Sequence[str], rest: Sequence[str], options: Sequence[str] = ()
) -> list[Override]:
    """Overrides from ``--set`` values and from the left-over ``--section.key value`` arguments.

    Raises ConfigError for every other left-over, so that a misspelt option is never ignored.
    """
    from apt_core.config import parse_override

    overrides: list[Override] = []
    problems: list[Problem] = []

    def take(text: str, where: str) -> None:
        try:
            overrides.append(parse_override(text, where=where))
        except ConfigError as error:
            problems.extend(error.problems)

    for text in assignments:
        take(text, "--set")
    waiting = list(rest)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if name.startswith("--") and "." in name:
            if not equals:
                if not waiting or waiting[0].startswith("--"):
                    problems.append(Problem("it needs a value", key=name))
                    continue
                value = waiting.pop(0)
            take(f"{name[2:]}={value}", name)
        elif argument.startswith("-"):
            problems.append(Problem(f"there is no option {name}", hint=did_you_mean(name, options)))
        else:
            hint = f"--profile {argument}" if not problems else ""
            problems.append(Problem(f"unexpected argument {argument!r}", hint=hint))
    if problems:
        raise ConfigError(problems)
    return overrides


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``apt-train``."""
    sys.exit(run_command(app, "apt-train", args))
