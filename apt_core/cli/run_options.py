"""What commands share that use the model of a run: which run, which of its weights, where."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, TextIO, cast

import typer

from apt_core.cli import completion
from apt_core.cli.output import complain, make_console

if TYPE_CHECKING:
    from pathlib import Path

    from apt_core.runs import Session

Run = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        help="A run's folder, one of its checkpoints, or the name of a profile, of which the "
        "newest run below runs/ is taken. Without it: the newest run of all.",
        show_default=False,
        autocompletion=completion.runs,
    ),
]
Step = Annotated[
    int | None, typer.Option(min=0, help="The checkpoint of this step; default: the newest.")
]
Weights = Annotated[
    str,
    typer.Option(
        help="last, best (by the loss on held-out text), or average (that the run keeps)."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        help="Add a plugin to those of the run; no:NAME leaves one out.",
        autocompletion=completion.plugins,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Set a key of a plugin's section, as in model.voting.k=5; repeatable.",
        autocompletion=completion.assignments,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile what a single text is computed by on a CPU: it takes 10 to 30 seconds at "
        "the first token, and a C++ compiler; tokens are faster then.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")]


def chosen_run(run: str | None) -> Path:
    """The folder of ``run``, or of the newest run; says on stderr which one is taken where that was
    not named. Raises ConfigError if there is none, or no checkpoint in it."""
    from apt_core.code_source import short_path
    from apt_core.profile_paths import user_path
    from apt_core.runs.finding import newest_run, run_called

    found = run_called(run) if run else newest_run()
    if not run or found != user_path(run):
        complain(f"run: {short_path(str(found))}")
    return found


@contextmanager
def opened(
    run: str | None,
    *,
    step: int | None = None,
    weights: str = "last",
    device: str = "auto",
    plugins: Sequence[str] | None = None,
    assignments: Sequence[str] | None = None,
    debug: bool = False,
) -> Iterator[Session]:
    """The session of a :func:`chosen_run` with the ``assignments`` of ``--set``; while the context
    lasts, what is logged goes to stderr: warnings, or with ``debug`` everything. Raises what
    :func:`~apt_core.runs.open_run` does."""
    from apt_core.cli.train import collect_overrides
    from apt_core.log import TolerantStream, logging_to
    from apt_core.runs import open_run
    from apt_core.runs.opened import Weights as OpenedWeights

    overrides = collect_overrides(assignments or (), ())
    console = make_console(cast(TextIO, TolerantStream(sys.stderr)))
    with logging_to(console, level="DEBUG" if debug else "WARNING"):
        yield open_run(
            chosen_run(run),
            step=step,
            weights=cast(OpenedWeights, weights),
            device=device,
            plugins=plugins or (),
            overrides=overrides,
        )
