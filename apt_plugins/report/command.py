"""``apt-report``: write the page of a run, whether it has ended or not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from apt_core import ConfigError
from apt_core.cli.output import say
from apt_core.cli.run_command import run_command
from apt_core.profile_paths import user_path

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The run's folder: runs/PROFILE/TIME.")],
    output: Annotated[
        Path | None, typer.Option(help="The page to write. Default: report.html in the folder.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write a page on a run: curves, timeline, throughput, samples.

    The run may be running, finished, failed or killed: the page shows what its folder holds. It is
    one file that loads nothing from elsewhere.
    """
    folder, output = user_path(folder), output and user_path(output)
    if not any((folder / name).is_file() for name in ("manifest.json", "metrics.jsonl")):
        raise ConfigError(
            "there is no run in this folder: neither manifest.json nor metrics.jsonl",
            where=str(folder),
            hint="give the folder that apt-train named at its end, such as runs/PROFILE/TIME",
        )
    if output is not None and output.is_dir():
        hint = f"name the page: --output {output / 'report.html'}"
        raise ConfigError("is a folder", "--output", str(output), hint)
    try:
        from apt_plugins.report.page import write_report
    except ModuleNotFoundError as error:
        hint = 'pip install "apt-kernel[report]"'
        raise ConfigError(f"{error.name} is not installed", hint=hint) from error
    try:
        say(write_report(folder, output))
    except OSError as error:
        raise ConfigError(
            f"the page cannot be written: {error.strerror}",
            key="--output",
            where=str(output or folder),
        ) from error


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``apt-report``."""
    sys.exit(run_command(app, "apt-report", args))
