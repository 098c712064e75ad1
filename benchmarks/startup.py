"""What starting a command costs, against importing the libraries that it needs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from _harness import Report, interleave, run
from apt_core.cli.verbs import PREFIX, VERBS
from apt_core.discovery import COMMAND_GROUP, installed_plugins

ROOT = Path(__file__).resolve().parent.parent

OF_PLUGINS = [name.removeprefix(PREFIX) for name in installed_plugins(COMMAND_GROUP)]
IMPORTS = ("-c", "import typer, pydantic, pluggy")
COMMANDS = {
    "package": ("-c", "import apt_core"),
    "hooks_list": ("-m", "apt_core", "hooks", "list"),
    "doctor": ("-m", "apt_core", "hooks", "doctor"),
    "explain": ("-m", "apt_core", "hooks", "explain", "training.learning_rate"),
    **{f"{verb}_help": ("-m", "apt_core", verb, "--help") for verb in (*VERBS, *OF_PLUGINS)},
}
COMPLETED = ("-c", "from apt_core.cli.train import main; main()")
"""What a shell starts at a press of the tab key."""

ASKED = {
    "_APT_TRAIN_COMPLETE": "complete_bash",
    "COMP_WORDS": "apt-train --model.d",
    "COMP_CWORD": "1",
}
TORCH = """
import runpy, sys
sys.argv = ["apt_core", *sys.argv[1:]]
try:
    runpy.run_module("apt_core", run_name="__main__")
except SystemExit:
    pass
sys.exit("torch was imported" if "torch" in sys.modules else 0)
"""


def process(arguments: Sequence[str], folder: str, **more: str) -> Callable[[], object]:
    """A call that runs Python from an empty folder, with ``more`` variables of the environment, and
    waits for it. The exit code of the doctor tells of this machine.

    Bytecode is kept between calls, as between starts of an installed command; without it, the
    figures would include compiling APT's modules.
    """
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": f"{folder}.pyc"}
    environment |= {"APT_CACHE": f"{folder}.cache", **more}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def call() -> None:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        if done.returncode and arguments != COMMANDS["doctor"]:
            done.check_returncode()

    return call


def measure(report: Report, quick: bool) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = os.path.join(parent, "empty")
        os.mkdir(folder)
        for arguments in COMMANDS.values():
            if arguments[0] == "-m":
                process(("-c", TORCH, *arguments[2:]), folder)()
        times = interleave(
            {
                "imports": process(IMPORTS, folder),
                **{name: process(command, folder) for name, command in COMMANDS.items()},
                "completion": process(COMPLETED, folder, **ASKED),
            },
            baseline="imports",
            rounds=5 if quick else 20,
            calls=1,
        )
    for name in (*COMMANDS, "completion"):
        report.ratio(f"{name}_over_imports", times, name, over="imports")
    report.noise("imports_over_imports", times)
    for name in ("imports", *COMMANDS, "completion"):
        report.add(f"{name}_ms", round(times.median(name) / 1e6, 1))


if __name__ == "__main__":
    run(
        "How long do commands that only look take to answer?",
        measure,
        packages=["pluggy", "pydantic", "typer", "rich"],
    )
