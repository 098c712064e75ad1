"""The command that a run which ended early prints goes on with that very run."""

from __future__ import annotations

import shlex

from apt_core.cli.run_command import run_command
from apt_core.cli.train import app

FAILS_ONCE = """\
import os
from apt_core import hookimpl

@hookimpl
def on_step_end(step):
    if step == 3 and "MENDED" not in os.environ:
        raise RuntimeError("not yet mended")
"""


def test_what_is_printed_goes_on_with_the_plugins_and_overrides_of_the_run(
    apt_train, tmp_path, monkeypatch, capsys
):
    plugin = tmp_path / "fails once.py"
    plugin.write_text(FAILS_ONCE)
    options = ("--plugin", str(plugin), "--strict", "--set", "model.num_layers=2")
    dotted = ("--training.max_steps", "5", "--evaluation.sample_prompt=a 'b' c")
    whole = apt_train(*options[3:], *dotted, name="whole")
    failed = apt_train(*options, *dotted)
    assert failed.code == 1
    (hint,) = (line for line in failed.err.splitlines() if "to go on: " in line)
    program, *arguments = shlex.split(hint.partition("to go on: ")[2])
    monkeypatch.setenv("MENDED", "1")
    assert (program, run_command(app, "apt-train", arguments)) == ("apt-train", 0)
    capsys.readouterr()
    assert [row["name"] for row in failed.manifest["plugins"]] == ["fails_once"]
    assert failed.manifest["step"] == 5 and failed.same_weights(whole)
