"""``apt-quantize``: makes a run with weights of 8 or 4 bits of a run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from apt_core import ConfigError, Problem
from apt_core.cli.output import Json, complain, make_console, print_table, say
from apt_core.cli.run_command import run_command
from apt_core.cli.run_options import Debug, Plugins, Run, Set, Step, Weights, opened
from apt_core.errors import Interrupted
from apt_core.parallel.signals import handling
from apt_core.profile_paths import user_path
from apt_plugins.quant.settings import GROUP, GROUPS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def stopped(number: int, frame: FrameType | None) -> None:
    """Let a signal end the command as Ctrl-C does, which leaves nothing behind."""
    raise Interrupted(number)


@app.command()
def quantize(
    run: Run = None,
    bits: Annotated[
        int | None, typer.Option(help="Bits of a weight: 8 or 4.", show_default=False)
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            help="With 4 bits, the weights that share a scale: 32, 64, 128 (the default) or 256; "
            "halved for rows that it does not divide. With 8 bits the weights of a row share one.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder of the new run.", show_default=False),
    ] = None,
    documents: Annotated[
        int,
        typer.Option(
            min=0,
            max=2**40,
            help="Held-out documents on which perplexity is measured before and after; 0: it is "
            "not measured.",
        ),
    ] = 64,
    step: Step = None,
    weights: Weights = "last",
    force: Annotated[bool, typer.Option("--force", help="Quantise unfinished runs, too.")] = False,
    plugin: Plugins = None,
    set_: Set = None,
    json: Annotated[bool, typer.Option("--json", help="Print quantisation.json.")] = False,
    debug: Debug = False,
) -> Json | None:
    """Make a run with weights of 8 or 4 bits, for generation, evaluation and export.

    apt-quantize runs/small --bits 4 -o runs/small-4bit

    The matrices of the blocks are rounded; embeddings, the projection to logits, routers and norms
    stay. What that costs is measured, per weight and on the run's held-out text.
    """
    problems = []
    if bits not in (8, 4):
        message = "is missing" if bits is None else f"is {bits}"
        problems.append(Problem(message, "--bits", hint="8 or 4"))
    if group is not None and group not in GROUPS:
        hint = f"one of {', '.join(map(str, GROUPS))}"
        problems.append(Problem(f"is {group}", "--group", hint=hint))
    elif group is not None and bits == 8:
        problems.append(Problem("goes with --bits 4: with 8 a row has one scale", "--group"))
    place = None if output is None else user_path(output).absolute()
    if place is None:
        problems.append(Problem("is missing", "--output", hint="-o FOLDER names the new run"))
    else:
        from apt_plugins.export.staging import check_target

        try:
            check_target(place, force=False)
        except ConfigError as error:
            problems += [
                Problem(p.message, p.key, p.where, "name another folder") for p in error.problems
            ]
    if problems or place is None or bits is None:
        raise ConfigError(problems)
    with (
        handling((signal.SIGTERM, signal.SIGHUP), stopped),
        opened(
            run,
            step=step,
            weights=weights,
            device="cpu",
            plugins=plugin,
            assignments=set_,
            debug=debug,
        ) as session,
    ):
        from apt_plugins.export.origin import check_finished
        from apt_plugins.quant.quantising import Asked, quantise
        from apt_plugins.quant.rounding import Rounding

        if step is None and weights == "last" and not force:
            check_finished(session)
        rounding = Rounding(8) if bits == 8 else Rounding(4, group or GROUP)
        with progress() as advance:
            record = quantise(Asked(session, weights, rounding, place, documents), advance)
    if json:
        return Json(record.model_dump())
    print_table(*record.table())
    complain(record.summary())
    say(place)
    return None


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """What to tell how far each part of the work is; drawn on a terminal."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = make_console(sys.stderr)
    drawn = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    known: dict[str, TaskID] = {}

    def advance(what: str, share: float) -> None:
        if what not in known:
            known[what] = drawn.add_task(what, total=1.0)
        drawn.update(known[what], completed=share)

    with drawn:
        yield advance


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``apt-quantize``."""
    sys.exit(run_command(app, "apt-quantize", args))
