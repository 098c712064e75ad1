"""``apt-data``: builds the token stores of a profile, and shows what is in them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer

from apt_core.cli import completion
from apt_core.cli.output import Json, make_console, output_apart, say
from apt_core.cli.run_command import run_command
from apt_core.cli.train import collect_overrides
from apt_core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from apt_core.data.loading import RunData
    from apt_core.data.store.format import PartName
    from apt_core.kernel import Kernel

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Build the data of a profile, and look at it.",
)

EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}

Profile = Annotated[
    str,
    typer.Option(
        "--profile",
        "-p",
        help="A path, or a name in ./profiles or among the installed ones.",
        autocompletion=completion.profiles,
    ),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        help="Activate a plugin, as apt-train does; no:NAME leaves one out.",
        autocompletion=completion.plugins,
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override a key: data.packing=pad. Also --section.key V.",
        autocompletion=completion.assignments,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")]


@app.command(cls=completion.KeysAreOptions, context_settings=EXTRA)
def build(
    context: typer.Context,
    profile: Profile = "",
    plugin: Plugins = None,
    set_: Assignments = None,
    engine: Annotated[
        str, typer.Option(help="local (processes of this machine) or ray (tasks of a cluster).")
    ] = "local",
    address: Annotated[
        str, typer.Option(help="The Ray cluster, as ray.init takes it; without it, this machine.")
    ] = "",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that encode; without it, one a core.")
    ] = None,
    json: AsJson = False,
    debug: Debug = False,
) -> Json | None:
    """Build the token stores of a profile, which runs then open, and say where they are."""
    if address and engine != "ray":
        raise ConfigError("--address goes with --engine ray")
    if address:
        os.environ["RAY_ADDRESS"] = address  # where ray.init looks for the cluster
    with _booted(context, profile, plugin, set_, debug=debug) as (kernel, console):
        from apt_core.cli.build_progress import BuildProgress
        from apt_core.data.inspection import store_rows

        with BuildProgress(console) as progress:
            data = _loaded(
                kernel,
                engine=engine,
                workers=workers,
                progress=progress.of_source,
            )
        rows = store_rows(data)
        for row in rows:
            build = progress.builds[row["name"] or ""]
            row |= {"built": build.built, "seconds": build.seconds}
    if json:
        return Json(rows)
    from apt_core.cli.data_text import print_stores

    print_stores(rows)
    return None


@app.command(cls=completion.KeysAreOptions, context_settings=EXTRA)
def inspect(
    context: typer.Context,
    profile: Profile = "",
    plugin: Plugins = None,
    set_: Assignments = None,
    part: Annotated[str, typer.Option(help="train or val.")] = "train",
    step: Annotated[
        int | None, typer.Option(min=1, help="Windows that this optimizer step sees; default: 1.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=0, help="Windows of the part from this one on, in its order.")
    ] = None,
    source: Annotated[str, typer.Option(help="The source of a mixture to take them from.")] = "",
    count: Annotated[int, typer.Option(min=1, help="How many windows.")] = 1,
    nproc: Annotated[
        int, typer.Option(min=1, help="The processes of the run, which share a step.")
    ] = 1,
    origins: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="MB",
            help="Read so much of the text at most to find where documents are from.",
        ),
    ] = 64,
    json: AsJson = False,
    debug: Debug = False,
) -> Json | None:
    """Show windows as the model sees them: decoded, with what is learned and what is not."""
    if part not in ("train", "val"):
        hint = did_you_mean(part, ("train", "val")) or "give train or val"
        raise ConfigError(f"--part: there is no part {part!r}", hint=hint)
    if step is not None and (window is not None or part == "val"):
        other = "--window" if window is not None else "--part val"
        raise ConfigError(f"--step and {other} exclude each other", hint="give one of them")
    with _booted(context, profile, plugin, set_, debug=debug) as (kernel, _):
        from apt_core.data.inspection import Chosen, view_windows

        chosen = Chosen(cast("PartName", part), step, window, source, count, nproc)
        views = view_windows(kernel, _loaded(kernel), chosen, max_chars=origins * 10**6)
    if json:
        return Json(views)
    from apt_core.cli.data_text import print_window

    console = make_console(sys.stdout)
    for view in views:
        print_window(console, view)
    return None


@app.command(cls=completion.KeysAreOptions, context_settings=EXTRA)
def stats(
    context: typer.Context,
    profile: Profile = "",
    plugin: Plugins = None,
    set_: Assignments = None,
    at: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="STEP", help="Show the weights of a mixture at this step."),
    ] = None,
    nproc: Annotated[
        int, typer.Option(min=1, help="The processes of the run, which share a step.")
    ] = 1,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the lengths of documents into a picture."),
    ] = None,
    json: AsJson = False,
    debug: Debug = False,
) -> Json | None:
    """Show the figures of each source: sizes, duplicates, lengths, padding, weights."""
    if plot is not None and find_spec("matplotlib") is None:
        message = "--plot needs matplotlib, which is not installed"
        raise ConfigError(message, hint="pip install matplotlib")
    with _booted(context, profile, plugin, set_, debug=debug) as (kernel, _):
        from apt_core.data.inspection import data_figures

        figures = data_figures(kernel, _loaded(kernel), nproc, at or ())
    if plot is not None:
        from apt_core.cli.data_text import draw_lengths

        draw_lengths(figures, plot)
    if json:
        return Json(figures)
    from apt_core.cli.data_text import print_figures

    print_figures(figures)
    if plot is not None:
        say(f"drawn in {plot}")
    return None


@contextmanager
def _booted(
    context: typer.Context,
    profile: str,
    plugins: Sequence[str] | None,
    assignments: Sequence[str] | None,
    *,
    debug: bool,
) -> Iterator[tuple[Kernel, Console]]:
    """The kernel of the profile, and a console on stderr, where all goes that is logged or printed
    meanwhile."""
    options = [name for parameter in context.command.params for name in parameter.opts]
    overrides = collect_overrides(assignments or (), context.args, options)
    if not profile:
        hint = f"{context.command_path} --profile tiny_debug"
        raise ConfigError("no profile was given", hint=hint)
    from apt_core.kernel import boot
    from apt_core.log import TolerantStream, logging_to

    console = make_console(cast(TextIO, TolerantStream(sys.stderr)))
    with output_apart(), logging_to(console, level="DEBUG" if debug else "INFO"):
        yield boot(profile, plugins=plugins or (), overrides=overrides), console


def _loaded(kernel: Kernel, **options: Any) -> RunData:
    from apt_core.data.loading import load_data
    from apt_core.kernel import before_the_run

    with before_the_run():
        return load_data(kernel, **options)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``apt-data``."""
    sys.exit(run_command(app, "apt-data", args))
