"""Completion in shells: what is completed, how it is installed, and that it never disturbs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer

import apt_core.cli.chat
import apt_core.cli.data
import apt_core.cli.eval
import apt_core.cli.generate
import apt_core.cli.hooks
import apt_core.cli.new
import apt_core.cli.train
from apt_core.cache import cache_dir
from apt_core.cli import completion
from apt_core.cli.run_command import run_command
from apt_core.cli.verbs import VERBS
from apt_core.config import describe_key, json_schema

if TYPE_CHECKING:
    from tests.cli.conftest import Command

ROOT = Path(apt_core.__file__).parents[1]
TRAIN, HOOKS, CHAT = apt_core.cli.train.app, apt_core.cli.hooks.app, apt_core.cli.chat.app
APPS = {
    "apt-train": TRAIN, "apt-hooks": HOOKS, "apt-chat": CHAT, "apt-data": apt_core.cli.data.app,
    "apt-eval": apt_core.cli.eval.app, "apt-generate": apt_core.cli.generate.app,
    "apt-new": apt_core.cli.new.app,
}  # fmt: skip

Complete = Callable[..., list[str]]


@pytest.fixture
def complete(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> Complete:
    """``complete(app, "apt-train", "-p", "t")``: what the last word is completed to."""

    def call(app: typer.Typer, prog: str, *words: str) -> list[str]:
        monkeypatch.setenv("COMP_WORDS", " ".join([prog, *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setenv(completion.variable(prog), "complete_bash")
            assert run_command(app, prog, []) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return [line for line in printed.out.splitlines() if line]

    return call


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_names_that_are_known_are_completed(complete: Complete, folder: Path) -> None:
    (folder / "profiles").mkdir()
    (folder / "profiles" / "tüny.yaml").touch()
    (folder / "tests.yaml").touch()
    (folder / "texts").mkdir()
    (folder / "taste.txt").touch()
    found = complete(TRAIN, "apt-train", "-p", "t")
    assert sorted(found) == ["tests.yaml", "texts/", "tiny_debug", "tüny"]
    (folder / "mine.py").touch()
    assert complete(TRAIN, "apt-train", "--plugin", "a,no:") == []  # nothing is installed here
    assert complete(TRAIN, "apt-train", "--plugin", "a,mi") == ["a,mine.py"]
    assert complete(HOOKS, "apt-hooks", "ex") == ["explain"]
    assert complete(HOOKS, "apt-hooks", "providers", "nor") == ["norm"]
    assert complete(HOOKS, "apt-hooks", "show", "on_step") == ["on_step_start", "on_step_end"]
    assert "--plugin" in complete(TRAIN, "apt-train", "--pl")


def test_plugins_are_completed_with_no_before_them(
    complete: Complete, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apt_core.discovery.installed_plugins", lambda *_: {"moe": 1, "mob": 1})
    assert complete(TRAIN, "apt-train", "--plugin", "mo") == ["moe", "mob"]
    assert complete(TRAIN, "apt-train", "--plugin", "x,no:mo") == ["x,no:moe", "x,no:mob"]


def test_runs_are_completed_the_newest_first(complete: Complete, folder: Path) -> None:
    for run in ("tiny/20260101", "tiny/20260202", "named"):
        (folder / "runs" / run).mkdir(parents=True)
        (folder / "runs" / run / "manifest.json").touch()
    (folder / "runs" / "nothing").mkdir()
    found = complete(CHAT, "apt-chat", "")
    assert found[:4] == ["tiny", "runs/tiny/20260202", "runs/tiny/20260101", "runs/named"]
    assert complete(CHAT, "apt-chat", "runs/no") == ["runs/nothing/"]
    assert complete(TRAIN, "apt-train", "--resume-from", "runs/na") == ["runs/named", "runs/named/"]


def test_keys_are_completed_and_kept_in_the_cache(
    complete: Complete, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ["--model.d_model", "--model.d_ff", "--model.dropout"]
    assert complete(TRAIN, "apt-train", "--model.d") == expected
    assert complete(TRAIN, "apt-train", "--set", "hardware.n") == [
        "hardware.num_threads=", "hardware.num_gpus=",
    ]  # fmt: skip
    assert complete(HOOKS, "apt-hooks", "explain", "model.vf") == [
        "model.vft.r", "model.vft.rank", "model.vft",
    ]  # fmt: skip
    file = cache_dir() / "completion.json"
    kept = json.loads(file.read_text())
    schema = json_schema()
    with monkeypatch.context() as patch:  # which would be made for each key
        patch.setattr("apt_core.config.reference.json_schema", lambda sections: schema)
        assert all(describe_key((), key.split(".")) for key in kept["keys"])
    kept["keys"] = ["model.dust"]
    file.write_text(json.dumps(kept))
    assert complete(TRAIN, "apt-train", "--model.d") == ["--model.dust"]
    for stale in ({**kept, "of": ["another version"]}, {"of": kept["of"]}, [], "{"):
        file.write_text(stale if isinstance(stale, str) else json.dumps(stale))
        assert complete(TRAIN, "apt-train", "--model.d") == expected, stale


def test_a_completion_that_fails_completes_nothing(
    complete: Complete, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> dict[str, object]:
        print("a plugin prints")
        raise RuntimeError("damaged")

    monkeypatch.setenv("APT_CACHE", "/proc/nothing")
    assert complete(TRAIN, "apt-train", "--model.d_m") == ["--model.d_model"]
    monkeypatch.setattr("apt_core.discovery.installed_plugins", failing)
    assert complete(TRAIN, "apt-train", "--plugin", "m") == []
    assert complete(TRAIN, "apt-train", "--model.d_m") == []


def test_every_command_completes_its_options_and_tells_its_version(
    complete: Complete, command: Command
) -> None:
    for prog, app in APPS.items():
        assert "--help" in complete(app, prog, "--h"), prog
        outcome = command(app, "--version", prog=prog)
        assert outcome.code == 0 and outcome.out.startswith("APT "), prog
        assert "--install-completion" in command(app, "--help", prog=prog).out
    assert {*APPS} == {name for name in completion.commands() if name[4:] in VERBS}


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_it_is_installed_once(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shell: str
) -> None:
    home = tmp_path / "a höme"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for start in (".bashrc", ".zshrc"):
        (home / start).write_bytes(b"export A=\xe9")
    for _ in range(2):
        outcome = command(HOOKS, "--install-completion", shell)
        assert (outcome.code, outcome.err) == (0, "")
    script = command(HOOKS, "--show-completion", shell).out
    (file,) = [path for path in home.rglob("apt.*") if path.is_file()]
    assert file.read_text() == script and all(prog in script for prog in APPS)
    if shell != "fish":
        lines = (home / f".{shell}rc").read_bytes().splitlines()
        assert len(lines) == 2 and lines[0] == b"export A=\xe9" and str(file).encode() in lines[1]


def test_where_it_cannot_be_installed_is_told(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc/nobody")
    outcome = command(TRAIN, "--install-completion", "bash", prog="apt-train")
    assert outcome.code == 1 and "completion cannot be installed" in outcome.err
    assert "--show-completion bash > FILE" in outcome.err
    monkeypatch.setattr(completion, "this_shell", lambda: "")
    for arguments, says in (
        (("--show-completion", "tcsh"), "not known for the shell 'tcsh'"),
        (("--install-completion", "tcsh"), "name one of bash, zsh, fish"),
        (("--show-completion",), "the shell that is used cannot be told"),
        (("--show-completion", "bash", "more"), "unexpected argument 'more'"),
    ):
        outcome = command(TRAIN, *arguments, prog="apt-train")
        assert (outcome.code, outcome.out) == (2, "") and says in outcome.err


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash_completes_with_the_script(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = command(HOOKS, "--show-completion", "bash").out
    (folder / "script.sh").write_text(script)
    starter = folder / "bin" / "apt-train"
    starter.parent.mkdir()
    starter.write_text(
        f"#!{sys.executable}\nimport sys\nfrom apt_core.cli.train import main\nmain()\n"
    )
    starter.chmod(0o755)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths).rstrip(os.pathsep))
    monkeypatch.setenv("PATH", f"{starter.parent}:{os.environ['PATH']}")
    code = (
        "source script.sh; complete -p apt-train; COMP_WORDS=(apt-train --profile tiny); "
        'COMP_CWORD=2; _apt_train_completion apt-train; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "tiny_debug" and done.stderr == ""
