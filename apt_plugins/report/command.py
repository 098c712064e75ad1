"""``apt-report``: write the page of a run, whether it has ended or not, or of several."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from apt_core import ConfigError, Problem
from apt_core.cli.output import say
from apt_core.cli.run_command import run_command
from apt_core.profile_paths import user_path

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="The folders of runs: runs/PROFILE/TIME."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The page to write. Default: report.html in the folder; of several runs "
            "comparison.html here."
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write a page on a run: curves, timeline, throughput, samples; or one that compares runs.

    A run may be running, finished, failed or killed: the page shows what its folder holds. It is
    one file that loads nothing from elsewhere.
    """
    folders, output = [user_path(folder) for folder in folders], output and user_path(output)
    _check_folders(folders)
    if output is not None and output.is_dir():
        hint = f"name the page: --output {output / 'report.html'}"
        raise ConfigError("is a folder", "--output", str(output), hint)
    try:
        from apt_plugins.report.comparison import write_comparison
        from apt_plugins.report.page import write_report
    except ModuleNotFoundError as error:
        hint = 'pip install "apt-kernel[report]"'
        raise ConfigError(f"{error.name} is not installed", hint=hint) from error
    try:
        if len(folders) > 1:
            say(write_comparison(folders, output or Path("comparison.html")))
        else:
            say(write_report(folders[0], output))
    except OSError as error:
        raise ConfigError(
            f"the page cannot be written: {error.strerror}",
            key="--output",
            where=str(output or folders[0]),
        ) from error


def _check_folders(folders: Sequence[Path]) -> None:
    """Raise a ConfigError with what is wrong with the folders that were named."""
    from apt_plugins.report.run_data import MAX_RUNS

    problems = [
        Problem(
            "there is no run in this folder: neither manifest.json nor metrics.jsonl",
            where=str(folder),
            hint="give the folder that apt-train named at its end, such as runs/PROFILE/TIME",
        )
        for folder in folders
        if not any((folder / name).is_file() for name in ("manifest.json", "metrics.jsonl"))
    ]
    known: dict[Path, Path] = {}
    for folder in folders:
        if (same := known.setdefault(folder.resolve(), folder)) is not folder:
            problems.append(Problem("the run is named twice", where=f"{same} and {folder}"))
    if len(folders) > MAX_RUNS:
        problems.append(
            Problem(f"{len(folders)} runs are named, and a page compares at most {MAX_RUNS}")
        )
    if problems:
        raise ConfigError(problems)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``apt-report``."""
    sys.exit(run_command(app, "apt-report", args))
