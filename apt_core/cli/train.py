"""``apt-train``: train what a profile describes."""

from __future__ import annotations

import os
import shlex
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer

from apt_core.cli import completion
from apt_core.cli.output import Json, complain, make_console
from apt_core.cli.run_command import ignore_termination, place_among_processes, run_command
from apt_core.errors import ConfigError, Problem, TrainingError, did_you_mean
from apt_core.profile_paths import unrecordable, user_path
from apt_core.secrets import mask_arguments

if TYPE_CHECKING:
    from rich.console import Console

    from apt_core.config import Override
    from apt_core.kernel import Kernel

VERIFIED_STEPS = 20
MAX_ARGUMENTS = 2_000

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    cls=completion.KeysAreOptions,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(
    context: typer.Context,
    profile: Annotated[
        str,
        typer.Option(
            "--profile",
            "-p",
            help="A path, or a name in ./profiles or among the installed ones.",
            autocompletion=completion.profiles,
        ),
    ] = "",
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            help="Activate a plugin: a name, a dotted module or a .py file; repeatable, comma "
            "lists allowed. no:NAME leaves one out.",
            autocompletion=completion.plugins,
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
        Path | None,
        typer.Option(
            help="Go on from this checkpoint or run folder.", autocompletion=completion.runs
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Any plugin failure, fallback or inactive key is an error."),
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override a key: training.max_epochs=5. Also --section.key V.",
            autocompletion=completion.assignments,
        ),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            help="Train in this many processes on this machine. Without it, as many as "
            "hardware.num_gpus says where hardware.distributed is set.",
            min=1,
        ),
    ] = None,
    stop_at_step: Annotated[
        int | None,
        typer.Option(
            help="Stop after this step, with a checkpoint. Unlike training.max_steps it leaves "
            "the schedules as they are.",
            min=1,
        ),
    ] = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Let a resume take another value of this rate from its step on: "
            "training.learning_rate, training.muon.learning_rate or training.gradient_clip; "
            "repeatable.",
        ),
    ] = None,
    verify_resume: Annotated[
        bool,
        typer.Option(
            "--verify-resume",
            help="Train a few steps (20, or --stop-at-step), in one go and again with a kill and a "
            "resume, and compare every bit.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and train nothing.")
    ] = False,
    explain: Annotated[
        str,
        typer.Option(
            metavar="KEY",
            help="Say what a key means, its value here and why, and train nothing.",
            autocompletion=completion.keys,
        ),
    ] = "",
    json: Annotated[
        bool, typer.Option("--json", help="The dry run's plan, or what is explained, as JSON.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and debug messages.")
    ] = False,
) -> Json | int | None:
    """Train a language model as a profile says.

    Keys of the profile are options too: --model.attention_name flash_v2
    """
    options = [name for parameter in context.command.params for name in parameter.opts]
    overrides = collect_overrides(set_ or (), context.args, options)
    if explain:
        from apt_core.cli.explained import show_explained

        return show_explained(explain, profile, plugin or (), overrides, as_json=json)
    inside, rank = place_among_processes()
    going_on = resume or resume_from is not None
    mistakes = (
        (not profile, "no profile was given", "apt-train --profile tiny_debug; see --help"),
        (
            resume and resume_from is not None,
            "--resume and --resume-from exclude each other",
            "give one of them",
        ),
        (
            bool(allow_change) and not going_on,
            "--allow-change goes with --resume or --resume-from",
            "",
        ),
        (json and not dry_run, "--json goes with --dry-run or --explain", ""),
        (
            verify_resume and (going_on or dry_run),
            "--verify-resume goes without --resume and --dry-run",
            "",
        ),
        (
            inside and nproc is not None,
            "--nproc: torchrun has started the processes already",
            "leave it out",
        ),
    )
    problems = [Problem(message, hint=hint) for found, message, hint in mistakes if found]
    paths = {
        "--profile": profile,
        "--output": output,
        "--resume-from": resume_from,
        "the working directory": os.getcwd(),
    }
    problems += unrecordable(paths | {f"--plugin {each}": each for each in plugin or ()})
    if problems:
        raise ConfigError(problems)

    from apt_core.kernel import boot
    from apt_core.log import TolerantStream, logging_to

    stream = TolerantStream(sys.stderr if json or rank else sys.stdout)
    console = make_console(cast(TextIO, stream))
    # Of several processes the first one speaks for all, and each of its own errors.
    level = "ERROR" if rank else "DEBUG" if debug else "INFO"
    # What a run was told, without where it is kept and in how many processes it trains.
    arguments = _options(profile=profile, plugin=plugin, set=set_, strict=strict) + context.args
    with logging_to(console, level=level):
        kernel = boot(
            profile,
            plugins=plugin or (),
            overrides=overrides,
            strict=strict,
            files=not dry_run,
        )
        if dry_run:
            from apt_core.planning.plan import make_plan, print_plan

            plan = make_plan(kernel, nproc)
            if json:
                return Json(plan)
            print_plan(console, plan)
            return 0
        if verify_resume:
            from apt_core.device import resolve_device

            trackers = sorted(
                {s.plugin for s in kernel.sections if s.path.startswith("monitoring.")}
            )
            if trackers:
                console.print(
                    f"left out: {', '.join(trackers)}, so that no tracker is told of these runs",
                    markup=False,
                )
            arguments += _options(nproc=nproc, plugin=[f"no:{name}" for name in trackers])
            device, _ = resolve_device(kernel.config.hardware.device)
            if kernel.config.data.begin_early:
                from apt_core.data.loading import load_data

                load_data(kernel)  # both runs are to find the same
            steps, deterministic = stop_at_step or VERIFIED_STEPS, device.type == "cuda"
            return verify(console, arguments, output, steps, deterministic=deterministic)
        if (processes := 1 if inside else nproc or _processes_wanted(kernel)) > 1:
            from apt_core.parallel.launch import launch

            arguments += _options(
                output=output,
                resume=resume,
                resume_from=resume_from,
                stop_at_step=stop_at_step,
                allow_change=allow_change,
                debug=debug,
            )
            return launch(processes, arguments)
        if kernel.config.data.begin_early:
            from apt_core.data.early import builder_command

            words = _options(profile=profile, plugin=plugin, set=set_) + context.args
            kernel.builder = builder_command(words)
        arguments += _options(nproc=kernel.place["WORLD_SIZE"] if inside else None)
        return run(
            kernel,
            None if rank else console,
            again=shlex.join(["apt-train", *mask_arguments(arguments)]),
            output=output,
            resume=resume,
            resume_from=resume_from,
            stop_at_step=stop_at_step,
            allow_change=allow_change or (),
        )


def _options(**values: Any) -> list[str]:
    """Options as words; what is None or False is left out, a list is an option each.

    >>> _options(output="a b", resume=False, stop_at_step=3)
    ['--output', 'a b', '--stop-at-step', '3']
    """
    words = []
    for name, given in values.items():
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value is not False:
                words.append(f"--{name.replace('_', '-')}")
                words += [] if value is True else [str(value)]
    return words


def _processes_wanted(kernel: Kernel) -> int:
    """The number of processes of a run that was given none: what the profile asks for and the
    machine has."""
    if not kernel.config.hardware.distributed or kernel.config.hardware.num_gpus < 2:
        return 1
    from apt_core.parallel.launch import processes_for

    processes, notice = processes_for(kernel.config)
    if notice and kernel.manager.strict:
        raise ConfigError(notice, hint="--strict allows no fallback")
    kernel.notices += [notice] if notice else []
    return processes


def run(kernel: Kernel, console: Console | None, *, again: str, **options: Any) -> int:
    """Train and print the closing summary, if there is a console; returns the exit code."""
    if console is not None:
        console.print(f"profile {kernel.config.name} loaded", markup=False)

    from apt_core.training import Trainer
    from apt_core.training.summary import print_summary, resume_hint

    trainer = Trainer(kernel, console=console, **options)
    try:
        # A signal between the end of the run and the lines below must not keep them back.
        with trainer.stopping.interrupts.listening():
            result = trainer.fit()
    except BaseException as error:
        if trainer.world_size > 1:
            ignore_termination()
        if console is not None and (
            hint := resume_hint(trainer.folder, trainer.step, again, error)
        ):
            complain(hint)
        raise
    if console is not None:
        print_summary(console, result, kernel)
        if result.status == "interrupted":
            console.print(resume_hint(trainer.folder, trainer.step, again), markup=False)
    return result.exit_code


def verify(
    console: Console,
    arguments: Sequence[str],
    output: Path | None,
    steps: int,
    *,
    deterministic: bool,
) -> int:
    """Compare a run that is killed and resumed with one that is not, and say how they differ."""
    from apt_core.training.verify import verify_resume

    with TemporaryDirectory(prefix="apt-verify-") as temporary:
        folder = user_path(output or temporary)
        console.print(
            f"training {steps} steps in one go, and again with a SIGKILL and a resume halfway",
            markup=False,
        )
        if deterministic:
            console.print(
                "training.deterministic is on: without it a GPU does not repeat its bits",
                markup=False,
            )
        verdict = verify_resume(arguments, folder, steps, deterministic=deterministic)
    for note in verdict.notes:
        console.print(f"note: {note}", markup=False)
    for difference in verdict.differences:
        console.print(f"differs: {difference}", markup=False, style="red")
    if verdict.differences:
        raise TrainingError(
            f"resuming is not exact: {len(verdict.differences)} differences, the first is "
            f"{verdict.differences[0]}"
        )
    console.print(f"bit-equal: {', '.join(verdict.compared)}", markup=False)
    return 0


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

    if len(assignments) + len(rest) > MAX_ARGUMENTS:
        message = f"more than {MAX_ARGUMENTS:,} arguments that set keys"
        raise ConfigError(message, hint="write a profile that extends this one")
    for text in assignments:
        take(text, "--set")
    waiting = deque(rest)
    while waiting:
        argument = waiting.popleft()
        name, equals, value = argument.partition("=")
        shown = mask_arguments([argument])[0]
        if name.startswith("--") and "." in name:
            if not equals:
                if not waiting or waiting[0].startswith("--"):
                    problems.append(Problem("it needs a value", key=name))
                    continue
                value = waiting.popleft()
            take(f"{name[2:]}={value}", name)
        elif argument.startswith("-"):
            key_option = _key_option(name.lstrip("-"))
            # A key of a section is what was written; an option is only nearly so.
            near = "" if "." in key_option else did_you_mean(name, options)
            hint = near or key_option
            problems.append(Problem(f"there is no option {name}", hint=hint))
        else:
            hint = _key_option(name)
            if equals:
                value = shown.partition("=")[2]
                hint = f"--set {shlex.quote(f'{_key_meant(name) or name}={value}')}"
            hint = hint or (f"--profile {shown}" if not problems else "")
            problems.append(Problem(f"unexpected argument {shown!r}", hint=hint))
    if problems:
        raise ConfigError(problems)
    return overrides


def _key_option(word: str) -> str:
    """How the key is given that a word stands for, or an empty string."""
    key = _key_meant(word)
    option = f"--{key} VALUE" if "." in key else f"--set {key}=VALUE"
    return f"did you mean {option}?" if key else ""


def _key_meant(word: str) -> str:
    """The key of the profile that is called so here or elsewhere, in whichever section."""
    from apt_core.config import key_like

    return key_like(word) or key_like(word.rpartition(".")[2])


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``apt-train``."""
    sys.exit(run_command(app, "apt-train", args))
