"""What starting a command costs, against importing the libraries that it needs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from _harness import Report, interleave, run

ROOT = Path(__file__).resolve().parent.parent

IMPORTS = ("-c", "import typer, pydantic, pluggy")
COMMANDS = {
    "hooks_list": ("-m", "apt_core", "hooks", "list"),
    "train_help": ("-m", "apt_core", "train", "--help"),
}


def process(arguments: Sequence[str], folder: str) -> Callable[[], object]:
    """A call that runs Python from an empty folder and waits for it.

    Bytecode is kept between calls, as between starts of an installed command; without it, the
    figures would include compiling APT's modules.
    """
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": f"{folder}.pyc"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def call() -> None:
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)

    return call


def measure(report: Report, quick: bool) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = os.path.join(parent, "empty")
        os.mkdir(folder)
        times = interleave(
            {
                "imports": process(IMPORTS, folder),
                **{name: process(command, folder) for name, command in COMMANDS.items()},
            },
            baseline="imports",
            rounds=5 if quick else 40,
            calls=1,
        )
    for name in COMMANDS:
        report.ratio(f"{name}_over_imports", times, name, over="imports")
    report.noise("imports_over_imports", times)
    for name in ("imports", *COMMANDS):
        report.add(f"{name}_ms", round(times.median(name) / 1e6, 1))


if __name__ == "__main__":
    run(
        "How long do commands that only look take to answer?",
        measure,
        packages=["pluggy", "pydantic", "typer", "rich"],
    )
