"""No two runs share a folder, nor one of checkpoints."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from datetime import datetime
from pathlib import Path

import pytest

from apt_core.cli.run_command import run_command
from apt_core.cli.train import app
from apt_core.errors import ConfigError
from apt_core.log import get_logger, logging_to
from apt_core.runs import folder as run_folder
from apt_core.runs import folder_lock
from apt_core.runs.finding import find_checkpoint
from apt_core.runs.folder import RunFolder, newest_folder


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
        RunFolder.existing(copy, "kept")
    run.close()
    again = RunFolder.existing(copy, "kept")
    assert again.checkpoints == run.checkpoints == Path.cwd() / "kept" / run.checkpoints.name
    # Both locks go with it, and the one of the folder where the other was refused.
    again.close()
    RunFolder.existing(run.path, "kept").close()


@pytest.mark.parametrize("said", ["/somewhere/else", "../../above", "..", ".", "../kept2/x", ""])
def test_a_manifest_does_not_decide_where_is_written(tmp_path, said):
    path = tmp_path / "run"
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"checkpoint_dir": said}))
    with pytest.raises(ConfigError, match=r"not below the run nor below .*checkpoint_dir"):
        RunFolder.existing(path, str(tmp_path / "kept"))
    for inside in ("saved", str(tmp_path / "kept" / "mine-1")):
        (path / "manifest.json").write_text(json.dumps({"checkpoint_dir": inside}))
        folder = RunFolder.existing(path, str(tmp_path / "kept"))
        assert folder.checkpoints == path / inside
        folder.close()


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
        find_checkpoint(tmp_path / "file", "path")


def test_a_child_that_outlives_its_run_does_not_keep_it_locked(tmp_path, in_children):
    """As the process of an uploader or of a data loader does when the run is killed."""
    reading, writing = os.pipe()

    def run():
        folder = RunFolder.create(tmp_path / "run", "mine", None)
        folder.begin_manifest()
        folder.write_manifest(status="running")
        if not os.fork():
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        assert in_children(run) == [-signal.SIGKILL]
        again = RunFolder.existing(tmp_path / "run")
        # A child leaves its parent the lock.
        os.waitpid(child, 0) if (child := os.fork()) else os._exit(0)
        with pytest.raises(ConfigError, match=f"going on in this folder: process {os.getpid()} of"):
            RunFolder.existing(tmp_path / "run")
        again.close()
        RunFolder.existing(tmp_path / "run").close()
    finally:
        os.close(writing)
        os.close(reading)


def test_the_holder_of_a_lock_is_known_from_the_manifest_where_it_runs_elsewhere(
    tmp_path, monkeypatch
):
    folder = RunFolder.create(tmp_path / "run", "mine", None)
    folder.begin_manifest()
    folder.manifest["process"].update(pid=12, host="node7")
    folder.write_manifest(status="running")
    monkeypatch.setattr(folder_lock, "_locking_process", lambda path: None)
    with pytest.raises(ConfigError, match=r"process 12 of node7, since \d{4}-"):
        RunFolder.existing(folder.path)
    monkeypatch.setattr(folder_lock, "_locking_process", lambda path: 2**22 + 1)
    with pytest.raises(ConfigError, match=rf"has ended and left one behind .*\b{os.getpid()}\b"):
        RunFolder.existing(folder.path)
    folder.close()


def test_rows_and_lines_after_a_file_was_moved_or_deleted_are_kept(tmp_path, caplog):
    folder = RunFolder.create(tmp_path / "run", "mine", None)
    rows = folder.path / "metrics.jsonl"
    with logging_to(file=folder.log_file):
        for step in range(4):
            folder.write_metrics({"step": step})
            get_logger("apt.training").info("step %s", step)
            if step == 0:
                rows.rename(tmp_path / "moved")
                folder.log_file.rename(tmp_path / "log.txt.1")
            if step == 2:
                rows.unlink()
                folder.log_file.unlink()
    folder.close()
    assert json.loads(rows.read_text()) == {"step": 3}
    lines = folder.log_file.read_text()
    assert "step 3" in lines and lines.count("metrics.jsonl was moved or deleted") == 1
    assert "step 0" in (tmp_path / "log.txt.1").read_text()


def test_the_newest_run_is_the_one_that_was_made_last_whatever_the_clock(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    years = [2026, 2026, 2025, *[2024] * 10]

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(years[number], 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr(run_folder, "datetime", Clock)
    caplog.set_level(logging.WARNING, "apt")
    for number in range(len(years)):
        folder = RunFolder.create(None, "mine", None)
        folder.write_manifest(status="running")
        folder.close()
        assert newest_folder("mine").name == folder.path.name, number
    assert folder.path.name == "20260102-030405-13"
    assert "the clock was ahead when runs/mine/20260102-030405 was made" in caplog.text
