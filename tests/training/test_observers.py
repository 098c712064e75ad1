"""Promise 2: an observer, failing or not, drawing random numbers or not, changes no weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from apt_core.hookspecs import POLICIES

if TYPE_CHECKING:
    from tests.training.conftest import CliRun

ON_HOOKS = sorted(name for name in POLICIES if name.startswith("on_"))
NEEDS_TROUBLE = {"on_provider_fallback", "on_plugin_failure", "on_exception", "on_resume"}

DRAWS = """
import random
import numpy
import torch
from apt_core import hookimpl

def draw():
    random.random()
    numpy.random.rand(3)
    torch.rand(3)
"""


def observer(folder: Path, hook: str, *, raises: bool, name: str = "noisy") -> str:
    """A plugin file that draws from every global generator in one hook."""
    path = folder / f"{name}.py"
    lines = [DRAWS, "@hookimpl", f"def {hook}():", "    draw()"]
    if raises:
        lines.append('    raise ValueError("boom 测试")')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def line_of_raise(plugin: str) -> int:
    lines = Path(plugin).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if "raise" in line)


@pytest.fixture(scope="module")
def made() -> dict[str, CliRun]:
    """Runs that several tests compare with."""
    return {}


@pytest.mark.parametrize("hook", [hook for hook in ON_HOOKS if hook not in NEEDS_TROUBLE])
def test_an_observer_that_draws_and_raises_changes_no_weight(apt_train, made, tmp_path, hook):
    epoch = ("--training.max_epochs", "1", "--model.dropout", "0.1")
    if "base" not in made:
        made["base"] = apt_train(*epoch, name="base")
    base = made["base"]
    plugin = observer(tmp_path, hook, raises=True)
    run = apt_train(*epoch, "--plugin", plugin, name="noisy")
    assert (base.code, run.code) == (0, 0)
    assert base.same_weights(run)
    row = next(row for row in run.manifest["plugins"] if row["name"] == "noisy")
    assert {failure["hook"] for failure in row["failures"]} == {hook}
    where = f"noisy.py:{line_of_raise(plugin)}"
    assert all(failure["where"].endswith(where) for failure in row["failures"])
    assert all("boom 测试" in failure["error"] for failure in row["failures"])
    count = len(row["failures"])
    times = "once" if count == 1 else f"{count} times"
    assert f"failed {times} in {hook}" in run.out
    assert where in run.out.replace("\n", "")
    assert "Traceback" not in run.out + run.err


@pytest.mark.parametrize("hook", [hook for hook in ON_HOOKS if hook not in NEEDS_TROUBLE])
def test_strict_stops_at_the_first_failure(apt_train, tmp_path, hook):
    plugin = observer(tmp_path, hook, raises=True)
    run = apt_train("--training.max_epochs", "1", "--plugin", plugin, "--strict")
    assert run.code == 1
    assert "plugin noisy failed in " + hook in run.err
    assert f"noisy.py:{line_of_raise(plugin)}" in run.err
    row = next(row for row in run.manifest["plugins"] if row["name"] == "noisy")
    assert len(row["failures"]) == 1
    assert run.manifest["status"] == "failed"


def test_ten_observers_that_draw_change_no_weight(apt_train, tmp_path):
    base = apt_train("--training.max_steps", "5", "--model.dropout", "0.1", name="base")
    plugins = [
        observer(tmp_path, hook, raises=False, name=f"noisy_{number}")
        for number, hook in enumerate(
            [
                "on_training_start", "on_epoch_start", "on_step_start", "on_backward_end",
                "on_step_end", "on_metrics", "on_evaluation_start", "on_evaluation_end",
                "on_checkpoint_saved", "apt_metrics",
            ]
        )
    ]  # fmt: skip
    run = apt_train(
        "--training.max_steps", "5", "--model.dropout", "0.1", "--plugin", ",".join(plugins),
        name="noisy",
    )  # fmt: skip
    assert run.code == 0, run.err
    assert base.same_weights(run)


LEAVES_BEHIND = {
    "grad mode": "import torch; torch.set_grad_enabled(False)",
    "working directory": "import os; os.chdir('/')",
    "unprintable error": "raise RuntimeError(chr(0xD800))",
    "long error": "raise RuntimeError('x' * 10_000_000)",
}


@pytest.mark.parametrize("what", LEAVES_BEHIND)
def test_what_an_observer_leaves_behind_does_not_reach_the_run(
    apt_train, tmp_path, monkeypatch, what
):
    monkeypatch.chdir(tmp_path)
    plugin = tmp_path / "messy.py"
    plugin.write_text(
        "from apt_core import hookimpl\n\n@hookimpl\ndef on_step_end(step):\n"
        f"    if step == 2:\n        {LEAVES_BEHIND[what]}\n"
    )
    base = apt_train("--training.max_steps", "5", name="base")
    run = apt_train("--training.max_steps", "5", "--plugin", str(plugin), name="messy")
    assert run.code == 0, run.err
    assert base.same_weights(run)
    assert (run.folder / "log.txt").stat().st_size < 200_000


def test_a_run_with_a_relative_folder_outlives_a_change_of_directory(
    profile, tmp_path, monkeypatch, capsys
):
    from apt_core.cli.run_command import run_command
    from apt_core.cli.train import app

    monkeypatch.chdir(tmp_path)
    plugin = tmp_path / "wanders.py"
    plugin.write_text(
        "import os\nfrom apt_core import hookimpl\n\n@hookimpl\ndef on_step_end():\n"
        "    os.chdir('/')\n"
    )
    arguments = ["-p", str(profile), "--plugin", str(plugin), "--output", "here"]
    assert run_command(app, "apt-train", [*arguments, "--training.max_steps", "3"]) == 0
    assert json.loads((tmp_path / "here" / "manifest.json").read_text())["status"] == "finished"


def test_a_plugin_without_hooks_is_told(apt_train, tmp_path):
    plugin = tmp_path / "classy.py"
    plugin.write_text(
        "from apt_core import hookimpl\n\nclass Mine:\n"
        "    @hookimpl\n    def on_step_end(self): pass\n"
    )
    run = apt_train("--training.max_steps", "2", "--plugin", str(plugin))
    assert "plugin classy implements no hook" in run.out
    assert "its class Mine has hooks" in run.out


def test_a_failure_in_on_provider_fallback(apt_train, tmp_path):
    plugin = observer(tmp_path, "on_provider_fallback", raises=True)
    arguments = ("--training.max_steps", "3", "--model.attention_name", "flash_v2")
    base = apt_train(*arguments, name="base")
    run = apt_train(*arguments, "--plugin", plugin, name="noisy")
    assert (base.code, run.code) == (0, 0)
    assert base.same_weights(run)
    assert "failed once in on_provider_fallback" in run.out
    assert run.err.count("flash_v2 not usable") + run.out.count("flash_v2 not usable") == 1


def test_a_failure_in_on_plugin_failure_is_counted_and_not_told_again(apt_train, tmp_path):
    failing = observer(tmp_path, "on_step_end", raises=True, name="failing")
    telling = observer(tmp_path, "on_plugin_failure", raises=True, name="telling")
    base = apt_train("--training.max_steps", "5", name="base")
    run = apt_train("--training.max_steps", "5", "--plugin", f"{failing},{telling}", name="noisy")
    assert (base.code, run.code) == (0, 0)
    assert base.same_weights(run)
    rows = {row["name"]: row for row in run.manifest["plugins"]}
    assert [len(rows[name]["failures"]) for name in ("failing", "telling")] == [3, 3]


def test_a_failure_in_on_exception_does_not_hide_the_error(apt_train, tmp_path):
    fatal = tmp_path / "fatal.py"
    fatal.write_text(
        "from apt_core import hookimpl\n\n@hookimpl\ndef on_step_end(step):\n"
        "    if step == 3:\n        raise RuntimeError('the real reason')\n",
        encoding="utf-8",
    )
    (tmp_path / "tiny.yaml").open("a", encoding="utf-8").write(
        f"plugins: [{{name: {fatal}, on_failure: required}}]\n"
    )
    plugin = observer(tmp_path, "on_exception", raises=True)
    run = apt_train("--plugin", plugin)
    assert run.code == 1
    assert "the real reason" in run.err
    assert "on_failure: required" in run.err
    assert [path.name for path in run.checkpoints] == ["step-00000003"]
    assert "--resume" in run.err


def test_a_failure_in_on_resume_changes_no_weight_of_the_rest(apt_train, tmp_path):
    steps = ("--training.max_steps", "4", "--model.dropout", "0.1")
    plugin = observer(tmp_path, "on_resume", raises=True)
    for name in ("base", "noisy", "strict"):
        assert apt_train(*steps, "--stop-at-step", "2", name=name).code == 0
    base = apt_train(*steps, "--resume", name="base")
    run = apt_train(*steps, "--resume", "--plugin", plugin, name="noisy")
    assert (base.code, run.code) == (0, 0) and base.same_weights(run)
    row = next(row for row in run.manifest["plugins"] if row["name"] == "noisy")
    assert [failure["hook"] for failure in row["failures"]] == ["on_resume"]
    assert f"noisy.py:{line_of_raise(plugin)}" in run.out.replace("\n", "")
    strict = apt_train(*steps, "--resume", "--strict", "--plugin", plugin, name="strict")
    assert strict.code == 1 and "noisy" in strict.err and "on_resume" in strict.err
