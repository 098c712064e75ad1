"""What commands print: JSON that nothing spoils, text that a terminal does not obey, and streams in
any state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer

import apt_core
from apt_core.cli import hooks, plugin_info, train
from apt_core.cli.run_command import run_command

if TYPE_CHECKING:
    from tests.cli.conftest import Command

ROOT = Path(__file__).parents[2]

NOISY = """
import ctypes, os, subprocess

from apt_core import hookimpl


def make_noise():
    print("printed")
    os.write(1, b"written to the descriptor\\n")
    ctypes.CDLL(None).printf(b"printed by C\\n")
    subprocess.run(["echo", "printed by a child"])


make_noise()


@hookimpl
def apt_register_config():
    make_noise()
    return []


@hookimpl
def apt_configure(config):
    make_noise()
"""
RED = """
from apt_core import PluginInfo
PLUGIN = PluginInfo(summary="\\x1b[31mred\\x07", version="1\\x1b[2J")
"""
RAISES = "raise ValueError('\\x1b]0;a title\\x07')\n"


@pytest.mark.parametrize(
    ("app", "arguments"),
    [
        (hooks.app, ["list", "--json"]),
        (hooks.app, ["show", "apt_configure", "--json"]),
        (hooks.app, ["plugins", "--json"]),
        (hooks.app, ["providers", "--json"]),
        (hooks.app, ["info", "attention", "tva_default", "--json"]),
        (hooks.app, ["schema"]),
        (train.app, ["-p", "tiny_debug", "--dry-run", "--json"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_json_is_all_that_stdout_gets(
    folder: Path, capfd: pytest.CaptureFixture[str], app: Any, arguments: list[str]
) -> None:
    if app is train.app:
        pytest.importorskip("torch")
    (folder / "noisy.py").write_text(NOISY, encoding="utf-8")
    assert run_command(app, "apt", [*arguments, "--plugin", "noisy.py"]) == 0
    print("a later line")
    out, err = capfd.readouterr()
    document, later = out[: out.rindex("a later")], out[out.rindex("a later") :]
    assert json.loads(document) and later == "a later line\n"
    for noise in ("printed", "written to the descriptor", "printed by C", "printed by a child"):
        assert f"{noise}\n" in err


def test_no_sequence_of_a_plugin_reaches_the_terminal(command: Command, folder: Path) -> None:
    (folder / "red.py").write_text(RED, encoding="utf-8")
    (folder / "raises.py").write_text(RAISES, encoding="utf-8")
    done = command(hooks.app, "plugins", "--plugin", "red.py,raises.py")
    assert r"\x1b[31mred\x07" in done.out and r"1\x1b[2J" in done.out
    assert r"ValueError: \x1b]0;a title\x07" in done.out
    refused = command(train.app, "-p", "tiny_debug", "--plugin", "raises.py", prog="apt-train")
    assert refused.code == 2 and r"\x1b]0;a title" in refused.err
    unknown = command(plugin_info.info_app, "attention", "\x1b[2J")
    assert unknown.code == 2
    for shown in (done, refused, unknown):
        assert not set(shown.out + shown.err) & {"\x1b", "\x07"}


STREAMS = """
import json, os, sys

sys.path.insert(0, sys.argv[1])
from apt_core.cli import hooks, train
from apt_core.cli.run_command import run_command

BAD = ["list", "-p", "no_such_profile"]


def case(name, arguments, *closed, full=None, app=hooks.app):
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        with os.fdopen(reader) as file:
            said = file.read()
        return name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said
    os.dup2(writer, 2)
    if full is not None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), full)
    for descriptor in closed:
        os.close(descriptor)
        setattr(sys, ("stdin", "stdout", "stderr")[descriptor], None)
    if name == "gone":
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")
    try:
        code = run_command(app, "apt-hooks", arguments)
        os.fstat(1)  # nothing else may have become the standard output
    finally:
        sys.stderr.flush()
    os._exit(code)


cases = [
    case("no stdout", ["list"], 1),
    case("no stdout, JSON", ["list", "--json"], 1),
    case("nothing", BAD, 0, 1, 2),
    case("no stderr", BAD, 2),
    case("full", ["docs"], full=1),
    case("full, JSON", ["list", "--json"], full=1),
    case("full stderr", BAD, full=2),
    case("gone", ["-p", "tiny_debug", "--dry-run"], app=train.app),
]
print(json.dumps({name: [code, said] for name, code, said in cases}))
"""


def test_streams_that_nobody_takes_end_in_a_code_and_a_sentence(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STREAMS, str(ROOT)], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    full = "error: the output cannot be written: No space left on device\n"
    outcomes = json.loads(done.stdout)
    for name in ("full", "full, JSON"):
        code, said = outcomes.pop(name)
        assert code == 1 and said.startswith(full) and "Traceback" not in said
    code, said = outcomes.pop("gone")
    assert code == 2 and said == "error: the working directory has been removed (cd to another)\n"
    assert outcomes == {
        "no stdout": [0, ""],
        "no stdout, JSON": [0, ""],
        "nothing": [2, ""],
        "no stderr": [2, ""],
        "full stderr": [2, ""],
    }


@pytest.mark.parametrize("option", ["--profile", "--output", "--resume-from", "--plugin"])
def test_a_file_name_that_is_no_utf8_is_bad_input(
    command: Command, folder: Path, option: str
) -> None:
    """Records of a run are text."""
    name = "b\udcff.py"
    (folder / name).write_text("")
    profile = [] if option == "--profile" else ["-p", "tiny_debug"]
    done = command(train.app, *profile, option, name, prog="apt-train")
    assert done.code == 2
    assert r"b\udcff.py is no UTF-8, as records are (rename it, or give a link to it)" in done.err
    listed = command(hooks.app, "plugins", "--plugin", name, "--json")
    assert [row["state"] for row in listed.json] == ["active"]


@pytest.mark.parametrize("app", [train.app, hooks.app])
def test_every_command_shows_its_versions(command: Command, app: typer.Typer) -> None:
    shown = command(app, "--version")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith(f"APT {apt_core.__version__} (Python ")
    assert "pluggy" in shown.out
    assert "--version" in command(app, "--help").out
