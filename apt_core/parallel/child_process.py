"""Makes the command of a process that runs a command of APT with this process's import path."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence


def apt_train_command(arguments: Sequence[str]) -> list[str]:
    """The command of a process that runs ``apt-train ARGUMENTS``."""
    return command_of("apt_core.cli.train", "apt-train", arguments)


def command_of(module: str, prog: str, arguments: Sequence[str]) -> list[str]:
    """The command of a process that runs ``PROG ARGUMENTS`` by the ``main`` of its module.

    It has this interpreter's options and import path. ``python -m`` would put the working directory
    first on that path, where a file with a library's name would be imported instead of the library.
    """
    path = [entry for entry in sys.path if isinstance(entry, str)]
    start = (
        f"import sys; sys.path[:] = {path!a}; sys.argv[0] = {prog!r}; "
        f"from {module} import main; main()"
    )
    options = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *options, "-c", start, *arguments]
