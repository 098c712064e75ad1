"""Where the checkpoints of a run are, whatever its manifest says."""

from __future__ import annotations

import json
import os

import pytest

from apt_core.errors import CheckpointError
from apt_core.runs.finding import find_checkpoint
from apt_core.runs.layout import checkpoints_folder, folder_name, list_checkpoints


def test_checkpoints_are_listed_by_step_and_nothing_else_is(tmp_path):
    names = ["step-00000012", "step-00000002", "step-123456789012"]
    for name in [*names, "step-x", ".step-00000003.tmp", "superseded-step-00000004"]:
        (tmp_path / name).mkdir()
    (tmp_path / folder_name(5)).write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == [names[1], names[0], names[2]]
    assert list_checkpoints(tmp_path / "none") == []


def test_a_manifest_does_not_decide_where_checkpoints_are_looked_for(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()

    def found(said, named=None):
        return checkpoints_folder(run, {"checkpoint_dir": said}, named)

    assert found(str(other / "here")) is None
    assert found(str(other / "here"), str(other)) == other / "here"
    assert found(str(other / "deep" / "here"), str(other)) is None
    assert found("../run") is None
    assert found("below") == run / "below"
    for nonsense in (None, 7, "a\0b"):
        assert found(nonsense) == run / "checkpoints"
    (run / "checkpoints").mkdir()
    assert found(str(other / "here"), str(other)) == run / "checkpoints"


def test_a_profile_that_is_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"checkpoint_dir": "/elsewhere"}))
    os.mkfifo(tmp_path / "profile.yaml")
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        find_checkpoint(tmp_path, "--run")
