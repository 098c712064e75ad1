"""What only looks at plugins and profiles never imports torch, and so answers at once."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import apt_core

ROOT = Path(__file__).parents[2]

COMMANDS = [
    "hooks list",
    "hooks list --json",
    "hooks list --plugin moe,align,routing,voter",
    "hooks list --all --profile gpt5_moe_reasoning --plugin no:moe,no:align,no:routing,no:voter",
    "hooks show on_step_end",
    "hooks plugins",
    "hooks plugins --json",
    "hooks providers",
    "hooks providers router",
    "hooks info attention flash_v2",
    "hooks schema",
    "hooks explain training.learning_rate",
    "hooks explain route_temp -p gpt5_moe_mini",
    "hooks doctor",
    "train -p tiny_debug --explain lr",
    "hooks docs",
    "hooks docs providers",
    "hooks docs commands",
    "plugin-list",
    "plugin-list --kind attention",
    "plugin-info attention tva_default",
    "--help",
    "train --help",
    "hooks --help",
    "data --help",
    "data build --help",
    "data inspect --help",
    "data stats --help",
    "eval --help",
    "generate --help",
    "chat --help",
    "new --help",
    "new profile --help",
    "new plugin --help",
    "plugin-list --help",
    "plugin-info --help",
    "report --help",
    "serve --help",
    "export --help",
]
VERBS = [
    "list", "show", "plugins", "providers", "info", "enable", "disable", "check", "explain",
    "doctor", "trace", "schema", "docs",
]  # fmt: skip
RUN = """
import contextlib, io, json, os, runpy, sys

def call(arguments):
    sys.argv = ["apt", *arguments]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_module("apt_core", run_name="__main__")
        except SystemExit as exit:
            return exit.code or 0
    return 0

def told(arguments):
    "The exit code of a command, and which modules it imported, from a fork of this process."
    reading, writing = os.pipe()
    if not os.fork():
        row = [call(arguments), [name for name in SLOW if name in sys.modules]]
        os.write(writing, json.dumps(row).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        return json.loads(file.read() or "null")

answers = {command: told(command.split()) for command in sys.argv[1:] if command in LISTINGS}
# What most of the others import, which would be a great part of their time.
import apt_core.kernel, apt_core.cli.hooks, apt_core.cli.plugin_info, rich.console, rich.markdown
answers |= {command: told(command.split()) for command in sys.argv[1:] if command not in LISTINGS}
print(json.dumps(answers))
"""
LISTINGS = ["hooks list", "hooks plugins", "plugin-list"]
"""What is looked at most, and begins with nothing imported but what commands are made of."""
SLOW = ["torch", "apt_core.config", "yaml", "rich.console", "packaging.specifiers"]
"""What takes a good part of a listing's time to import."""
NEVER = ["torch", "numpy", "pyarrow", "tokenizers", "datasets", "matplotlib", "uvicorn"]
"""What no look at a command may import."""


def python(code: str, *arguments: str, folder: Path) -> Any:
    """The JSON that a fresh interpreter prints; it imports this tree."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}
    environment.pop("APT_DISABLE_PLUGIN_AUTOLOAD", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


MODULES = [
    "apt_core",
    "apt_core.kernel",
    "apt_core.testing",
    "apt_core.testing.fixtures",
    "apt_core.cli.chat",
    "apt_core.cli.data",
    "apt_core.cli.generate",
    "apt_core.cli.eval",
    "apt_core.cli.hooks",
    "apt_core.cli.train",
    "apt_core.cli.plugin_info",
    "apt_core.providers",
    "apt_core.schedules",
    "apt_plugins.align.plugin",
    "apt_plugins.export.command",
    "apt_plugins.export.plugin",
    "apt_plugins.flash_attn.plugin",
    "apt_plugins.growth.plugin",
    "apt_plugins.moe.plugin",
    "apt_plugins.report.plugin",
    "apt_plugins.routing.plugin",
    "apt_plugins.serve.command",
    "apt_plugins.tensorboard.plugin",
    "apt_plugins.to_tva.plugin",
    "apt_plugins.trackio.plugin",
    "apt_plugins.voter.plugin",
    "apt_plugins.wandb.plugin",
]
IMPORT = """
import importlib, json, os, sys

import apt_core.kernel, apt_core.cli.hooks  # a great part of what the others import

found = {}
for module in sys.argv[1:]:
    reading, writing = os.pipe()
    if not os.fork():
        importlib.import_module(module)
        os.write(writing, json.dumps("torch" in sys.modules).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        found[module] = json.loads(file.read() or "null")
print(json.dumps(found))
"""


def test_importing_imports_no_torch(folder: Path) -> None:
    """Whichever is imported first: test_import_circles tells that each can be imported alone."""
    assert python(IMPORT, *MODULES, folder=folder) == dict.fromkeys(MODULES, False)


LOOKS = [*COMMANDS, *(f"hooks {verb} --help" for verb in VERBS)]


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each look gave."""
    code = f"SLOW, LISTINGS = {SLOW + NEVER}, {LISTINGS}\nimport pydantic, typer\n{RUN}"
    return python(code, *LOOKS, folder=tmp_path_factory.mktemp("looks"))


@pytest.mark.parametrize("command", LOOKS)
def test_looking_imports_no_torch(command: str, looked: dict[str, Any]) -> None:
    code, slow = looked[command]
    # The doctor says by it what is missing here.
    assert code == 0 or (command == "hooks doctor" and not find_spec("torch"))
    assert not {*slow} & {*NEVER}
    # The oldest typer imports rich itself, and what is not installed is told by packaging.
    if command in LISTINGS and find_spec("torch"):
        assert not slow


def test_the_working_directory_comes_last_on_the_import_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plugin there may have the name of a library. A checkout is run from where it lies."""
    monkeypatch.setattr(sys, "argv", ["apt", "--help"])
    checkout = Path(apt_core.__file__).parents[1]
    rest = [entry for entry in sys.path if entry not in ("", str(checkout))]
    for here, expected in ((folder, [*rest, str(folder)]), (checkout, [str(checkout), *rest])):
        monkeypatch.chdir(here)
        monkeypatch.setattr(sys, "path", [str(here), *rest])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_module("apt_core", run_name="__main__")
        assert sys.path == expected


def test_the_verbs_are_all_of_them() -> None:
    from apt_core.cli.hooks import app

    names = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert names == set(VERBS)
