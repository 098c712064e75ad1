"""``apt-hooks check`` and ``trace``, the two of its verbs that train."""

from __future__ import annotations

import json

import pytest

from apt_core.cli.hooks import app
from apt_core.cli.run_command import run_command
from apt_core.testing import TINY_PROFILE
from apt_core.testing.tiny import TEXT

OBSERVER = """\
from apt_core import hookimpl

@hookimpl
def on_step_end(step, trainer):
    {body}

@hookimpl(wrapper=True)
def on_epoch_start():
    return (yield)
"""


@pytest.fixture
def observer(tmp_path, monkeypatch):
    """``observer(body)``: the path of a plugin whose on_step_end does this."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))

    def write(body: str) -> str:
        (tmp_path / "watcher.py").write_text(OBSERVER.format(body=body))
        return "watcher.py"

    return write


def test_check_passes_a_good_plugin(observer, capsys):
    plugin = observer("pass")
    assert run_command(app, "apt-hooks", ["check", plugin, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row.keys() for row in rows] == [{"check", "result", "ok", "detail"}] * 3
    assert [row["ok"] for row in rows] == [True] * 3


def test_check_ends_with_1_and_says_what_is_wrong(observer, capsys):
    plugin = observer("trainer.model.get_parameter('final_norm.weight').data.add_(1)")
    assert run_command(app, "apt-hooks", ["check", plugin]) == 1
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["result", "check", "detail"]
    assert [line.split()[0] for line in lines] == ["ok", "ok", "FAILED"]
    assert "the weights differ from a run without the plugin" in lines[2]


def test_check_of_what_is_not_there_ends_with_1(observer, capsys):
    observer("pass")
    assert run_command(app, "apt-hooks", ["check", "watchr.py"]) == 1
    assert "did you mean 'watcher.py'?" in capsys.readouterr().out


def test_trace_times_every_implementation_of_a_run(observer, capsys, tmp_path):
    plugin = observer("pass")
    (tmp_path / "text.txt").write_text(TEXT)
    data = {"data": {"train_path": "text.txt"}, "plugins": [plugin]}
    (tmp_path / "tiny.yaml").write_text(json.dumps({**TINY_PROFILE, **data}))
    arguments = ["-p", "tiny", "--training.max_steps", "3", "--output", "run"]
    assert run_command(app, "apt-hooks", ["trace", "--", *arguments]) == 0
    printed = capsys.readouterr().out
    (row,) = (line.split() for line in printed.splitlines() if line.startswith("on_step_end"))
    assert row[:3] == ["on_step_end", "watcher", "3"]
    assert (tmp_path / "run" / "manifest.json").is_file()


def test_trace_ends_as_the_run_does(observer, capsys):
    observer("pass")
    assert run_command(app, "apt-hooks", ["trace", "--", "-p", "tiny_debug", "--stric"]) == 2
    assert "did you mean '--strict'?" in capsys.readouterr().err
