"""Without a run's folder the newest run is meant; what it was trained on is in its manifest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from apt_core.errors import ConfigError

pytest.importorskip("torch", reason="checkpoints are read with torch")

from apt_core.runs.finding import newest_run, run_called
from apt_core.runs.trained_on import data_row, forms_of


def make_run(
    path: str, since: str, *, checkpoints: str | None = "checkpoints", **manifest: Any
) -> Path:
    folder = Path(path)
    folder.mkdir(parents=True)
    if checkpoints is not None:
        (folder / checkpoints / "step-00000001").mkdir(parents=True)
        (folder / checkpoints / "step-00000001" / "manifest.json").write_text("{}")
        manifest["checkpoint_dir"] = str((folder / checkpoints).resolve())
    manifest = {"started": "2026-01-01T00:00:00Z", "process": {"since": since}, **manifest}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "profile.yaml").write_text("training: {checkpoint_dir: kept}\n")
    return folder


def test_the_newest_run_is_that_which_was_started_or_resumed_last_and_has_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"runs: there is no run with a checkpoint in it.*apt-train"
    ):
        newest_run()
    old = make_run("runs/small/20260101-000000", "2026-03-01T00:00:00Z")
    named = make_run("runs/mine", "2026-02-01T00:00:00Z", checkpoints="elsewhere")
    make_run("runs/small/20260401-000000", "2026-04-01T00:00:00Z", checkpoints=None)
    broken = Path("runs/small/20260501-000000")
    (broken / "checkpoints" / "step-00000001").mkdir(parents=True)
    (broken / "manifest.json").write_text("[not JSON")
    assert newest_run() == old
    make_run("runs/other/20260102-000000", "2026-05-01T00:00:00Z")
    # A manifest does not decide where checkpoints are read.
    outside = make_run("runs/outside", "2026-06-01T00:00:00Z", checkpoints=None)
    (outside / "manifest.json").write_text('{"checkpoint_dir": "/", "started": "2027"}')
    assert newest_run() == Path("runs/other/20260102-000000")
    for name, expected in {
        "small": old,
        "runs/small": old,
        str(tmp_path / "runs" / "small"): tmp_path / old,
        "runs/mine": named,
        "mine": named,
        "runs/mine/elsewhere": named / "elsewhere",
        "runs/mine/elsewhere/step-00000001": named / "elsewhere" / "step-00000001",
    }.items():
        assert run_called(name) == expected, name
    Path("small").mkdir()  # something else of the same name
    assert run_called("small") == old
    Path("file").touch()
    for name, expected_error in {
        "runs/small/20260401-000000": "there is no checkpoint in this folder (give the folder of",
        "runs/smal": "there is no such run (did you mean 'runs/small'?)",
        "file": "is a file: a run is a folder",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(f"{name}: RUN: {expected_error}")):
            run_called(name)


def test_what_a_run_was_trained_on_is_told_by_its_checkpoint_or_its_manifest(
    tmp_path: Path,
) -> None:
    counts = {"counts": {"read": 9, "texts": 4, "pairs": 3, "conversations": True}}
    run = make_run(str(tmp_path / "run"), "", data={"sources": [counts, counts, {"counts": 3}, 5]})
    there = run / "checkpoints" / "step-00000001"
    assert forms_of(data_row(there)) == {"text": 8, "pair": 6}
    (there / "manifest.json").write_text(json.dumps({"data": counts}))
    assert forms_of(data_row(there)) == {"text": 4, "pair": 3}
    assert data_row(there, {"data": {"windows": 3}}) == {"windows": 3}
    for bad in ("[]", "{", '{"data": []}'):
        (there / "manifest.json").write_text(bad)
        (run / "manifest.json").write_text(bad)
        assert not data_row(there) and not forms_of(data_row(there))
