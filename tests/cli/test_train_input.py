"""``apt-train`` and bad input: found before anything heavy is imported, said in one block."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer

from apt_core.cli.run_command import run_command
from apt_core.cli.train import app, collect_overrides
from apt_core.errors import ConfigError, PluginError

if TYPE_CHECKING:
    from tests.cli.conftest import Command

TINY = ("-p", "tiny_debug")
NO_ROOM = "there is no option"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no profile was given (apt-train --profile tiny_debug; see --help)"),
        (["-p", "tiny_debgu"], "did you mean 'tiny_debug'?"),
        (["-p", "nowhere/at/all.yaml"], "no profile 'nowhere/at/all.yaml'"),
        ([*TINY, "--stric"], f"{NO_ROOM} --stric (did you mean '--strict'?)"),
        ([*TINY, "--outptu", "x"], f"{NO_ROOM} --outptu (did you mean '--output'?)"),
        ([*TINY, "--plugins=x"], f"{NO_ROOM} --plugins (did you mean '--plugin'?)"),
        ([*TINY, "-q"], f"{NO_ROOM} -q"),
        (["tiny_debug"], "unexpected argument 'tiny_debug' (--profile tiny_debug)"),
        ([*TINY, "--model.d_model"], "--model.d_model: it needs a value"),
        ([*TINY, "--model.d_model", "--strict"], "--model.d_model: it needs a value"),
        ([*TINY, "--set", "model.d_model"], "'model.d_model' has no '='"),
        ([*TINY, "--model.d_modle", "3"], "--model.d_modle: model.d_modle: unknown key"),
        ([*TINY, "--model.d_modle", "3"], "(did you mean 'd_model'?)"),
        ([*TINY, "--set", "modle.d_model=3"], "did you mean 'model'?"),
        (["training.max_steps=3", *TINY], "(--set training.max_steps=3)"),
        (["training.lr=3", *TINY], "(--set training.learning_rate=3)"),
        (["name=a b", *TINY], "(--set 'name=a b')"),
        (["training.max_steps", *TINY], "(did you mean --training.max_steps VALUE?)"),
        ([*TINY, "--lr=3"], f"{NO_ROOM} --lr (did you mean --training.learning_rate VALUE?)"),
        ([*TINY, "--epochs=3"], f"{NO_ROOM} --epochs (did you mean --training.max_epochs VALUE?)"),
        ([*TINY, "--seed=3"], f"{NO_ROOM} --seed (did you mean --training.seed VALUE?)"),
        ([*TINY, "--name=a"], f"{NO_ROOM} --name (did you mean --set name=VALUE?)"),
        ([*TINY, "--model.norm_name", "RMSNorm"], "did you mean 'rmsnorm'?"),
        ([*TINY, "--batch-size=3"], "(did you mean --training.batch_size VALUE?)"),
        ([*TINY, "--model.attention_name", "flash"], "did you mean 'flash_v2'?"),
        ([*TINY, "--json"], "--json goes with --dry-run"),
        ([*TINY, "--resume", "--resume-from", "x"], "exclude each other"),
        ([*TINY, "--plugin", "gone.py"], "plugin gone: there is no file gone.py"),
        ([*TINY, "--plugin", "gone"], "no such plugin: not installed, not a module"),
        ([*TINY, "--model.attention_name", "tva_defualt"], "did you mean 'tva_default'?"),
        ([*TINY, "--profile"], "--profile"),
    ],
)
def test_bad_input_ends_with_2_in_one_block_without_a_traceback(
    command: Command, folder: Path, arguments: list[str], said: str
) -> None:
    done = command(app, *arguments, prog="apt-train")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and said in done.err
    assert "Traceback" not in done.err
    assert list(folder.iterdir()) == []


def test_every_mistake_on_the_command_line_is_reported_at_once(command: Command) -> None:
    arguments = ["--stric", "--set", "model", "--training.max_epochs", "stray"]
    done = command(app, *TINY, *arguments, prog="apt-train")
    assert done.code == 2
    head, *lines = done.err.splitlines()
    assert head == "error: 2 problems:"
    assert "has no '='" in lines[0] and "--strict" in lines[1]


def test_a_profile_with_five_mistakes_reports_five(command: Command, folder: Path) -> None:
    (folder / "five.yaml").write_text(
        "model: {d_modle: 8, num_heads: -1, tva: {r: x}}\n"
        "training: {max_epochs: 1.5}\n"
        "plugins: [gone]\n"
    )
    done = command(app, "-p", "five", prog="apt-train")
    head, *lines = done.err.splitlines()
    assert (done.code, head) == (2, "error: 5 problems:") and len(lines) == 5
    places = ("five.yaml:1", "five.yaml:1", "five.yaml:1", "five.yaml:2", "five.yaml:3")
    assert sorted(line.split(": ")[0].removeprefix("  - ") for line in lines) == sorted(places)


@pytest.mark.parametrize(
    ("assignments", "rest", "expected"),
    [
        (["training.max_epochs=5"], [], [("training.max_epochs", 5)]),
        ([], ["--model.d_model", "32"], [("model.d_model", 32)]),
        ([], ["--model.d_model=32", "--a.b", "-1"], [("model.d_model", 32), ("a.b", -1)]),
        ([], ["--training.learning_rate", "3e-5"], [("training.learning_rate", 3e-5)]),
        (["a.b=x=y"], ["--a.c={d: 1}"], [("a.b", "x=y"), ("a.c", {"d": 1})]),
    ],
)
def test_dotted_options_and_set_are_overrides(
    assignments: list[str], rest: list[str], expected: list[tuple[str, object]]
) -> None:
    taken = collect_overrides(assignments, rest)
    assert [(override.key, override.value) for override in taken] == expected


# How any command ends


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        (ConfigError("wrong"), 2, "error: wrong\n"),
        (
            PluginError("it stops", plugin="p", hook="h"),
            1,
            "error: it stops\n(add --debug for the traceback)\n",
        ),
        (
            ValueError("a defect\nin two lines"),
            1,
            "error: unexpected failure: ValueError: a defect\n(add --debug for the traceback)\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (typer.Exit(3), 3, ""),
    ],
)
def test_the_exit_code_and_the_message_follow_from_the_error(
    capsys: pytest.CaptureFixture[str], ending: BaseException, code: int, said: str
) -> None:
    app = typer.Typer()

    @app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def end() -> None:
        raise ending

    assert run_command(app, "end", []) == code
    assert capsys.readouterr().err == said
    if code in (1, 2):
        run_command(app, "end", ["--debug"])
        assert capsys.readouterr().err.startswith("Traceback (most recent call last):")


def test_bad_input_and_help_never_import_torch(folder: Path) -> None:
    (folder / "exits.py").write_text("import sys\n\nsys.exit(3)\n")
    code = (
        "import sys\n"
        "from apt_core.cli.run_command import run_command\n"
        "from apt_core.cli.train import app\n"
        "bad = (['--help'], [], ['--stric'], ['--model.d_modle', '3'], ['--plugin', 'exits.py'])\n"
        "codes = [run_command(app, 'apt-train', ['-p', 'tiny_debug', *each]) for each in bad[2:]]\n"
        "codes += [run_command(app, 'apt-train', each) for each in bad[:2]]\n"
        "print(codes, 'torch' in sys.modules)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({str(root)!r})\n{code}"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "[2, 2, 2, 0, 2] False", done.stderr
