"""No two runs share a folder, nor one of checkpoints."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest

from apt_core.cli.run_command import run_command
from apt_core.cli.train import app
from apt_core.errors import ConfigError
from apt_core.training import run_folder
from apt_core.training.restoring import named_checkpoint
from apt_core.training.run_folder import RunFolder


@pytest.fixture
def one_second(tmp_path, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr(run_folder, "datetime", Clock)
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_runs_that_start_in_one_second_have_folders_of_their_own(one_second, tmp_path, monkeypatch):
    """From one working directory and from two, of one profile and of one that extends it."""
    kept = tmp_path / "kept"
    runs = [RunFolder.create(None, name, str(kept)) for name in ("mine", "mine", "other/run")]
    monkeypatch.chdir(tmp_path / "there")
    runs.append(RunFolder.create(None, "mine", str(kept)))
    runs.append(RunFolder.create(None, "mine", None))
    time = "20260102-030405"
    assert [str(run.path.relative_to(tmp_path)) for run in runs] == [
        f"here/runs/mine/{time}", f"here/runs/mine/{time}-2", f"here/runs/other_run/{time}",
        f"there/runs/mine/{time}", f"there/runs/mine/{time}-2",
    ]  # fmt: skip
    assert [run.checkpoints.name for run in runs] == [
        f"mine-{time}", f"mine-{time}-2", f"other_run-{time}", f"mine-{time}-3", "checkpoints",
    ]  # fmt: skip
    assert {run.checkpoints.parent for run in runs[:4]} == {kept}
    for run in runs:
        run.close()


def test_a_copy_of_a_run_does_not_write_into_its_checkpoints(one_second, tmp_path):
    run = RunFolder.create(None, "mine", "kept")
    run.write_manifest(status="running")
    copy = shutil.copytree(run.path, tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"kept/mine-\S+: training\.checkpoint_dir: another run"):
        RunFolder.existing(copy)
    run.close()
    again = RunFolder.existing(copy)
    assert again.checkpoints == run.checkpoints == Path.cwd() / "kept" / run.checkpoints.name
    # Both locks go with it, and the one of the folder where the other was refused.
    again.close()
    RunFolder.existing(run.path).close()


def test_a_home_directory_is_one_on_the_command_line(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    short = ["-p", str(profile), "--training.max_steps", "1", "--evaluation.sample_tokens", "0"]
    assert run_command(app, "apt-train", [*short, "--output=~/run"]) == 0
    assert run_command(app, "apt-train", [*short, "--output=~/to", "--resume-from=~/run"]) == 0
    assert all((tmp_path / name / "manifest.json").is_file() for name in ("run", "to"))


def test_a_folder_in_use_is_refused_under_its_lock(tmp_path):
    output = tmp_path / "run"
    going_on = RunFolder.create(output, "mine", None)
    with pytest.raises(ConfigError, match="another run is going on"):
        RunFolder.create(output, "mine", None)
    going_on.close()
    for _ in range(2):
        with pytest.raises(ConfigError, match="in use"):
            RunFolder.create(output, "mine", None)
    (tmp_path / "file").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        RunFolder.create(tmp_path / "file", "mine", None)
    with pytest.raises(ConfigError, match="is a file: a checkpoint is a folder"):
        named_checkpoint(tmp_path / "file")
