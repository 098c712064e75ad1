"""``apt-export``: what it writes, proves, refuses and leaves behind, with an attention and an
exporter of somebody else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apt_core.cli.run_command import run_command
from apt_core.errors import ConfigError
from apt_core.runs import open_run
from apt_core.testing import tiny_run
from apt_plugins.export.command import app, progress
from apt_plugins.export.exporting import Order
from apt_plugins.export.exporting import export as export_session
from apt_plugins.export.held_out import HeldOutText
from apt_plugins.export.origin import origin_of
from apt_plugins.export.staging import staged

PLUGIN = Path(__file__).with_name("own_exporter.py")
SETTINGS = {
    "model.attention_name": "louder",
    "model.num_layers": 2,
    "training.ema_decay": 0.5,
    "training.save_every_steps": 2,
    "evaluation.eval_freq": 2,
    "evaluation.sample_tokens": 0,
    "data.train_path": "text.txt",
}
DROP = ("--drop", "echo")
UNPROVEN = ("--unproven", "-O", "requires=nothing-at-all")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 4 steps."""
    folder = tmp_path_factory.mktemp("exported")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Line {n}: {n} and {n + 1} é" for n in range(60)))
    settings = {**SETTINGS, "data.train_path": str(text)}
    tiny_run(str(PLUGIN), steps=4, overrides=settings, output=folder / "run")
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


Export = Callable[..., tuple[int, str, str]]


@pytest.fixture
def export(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Export:
    """``export(*arguments, *where)``: the exit code, stdout and stderr of the command."""
    monkeypatch.chdir(tmp_path)

    def called(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        words = ["--plugin", str(PLUGIN), *map(str, arguments)]
        code = run_command(app, "apt-export", words)
        out, err = capfd.readouterr()
        return code, out, err

    return called


def left(folder: Path) -> list[str]:
    """What is in a folder beside the run."""
    return sorted(path.name for path in folder.iterdir() if path.name != "run")


def test_an_exporter_and_an_attention_of_somebody_else_take_part(
    run: Path, export: Export, tmp_path: Path
) -> None:
    code, out, err = export(run, "--to", "numpy", *DROP, "-o", "out")
    assert (code, out) == (0, "out\n"), err
    assert "numpy: logits within" in err and "greedy tokens equal" in err
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["proven"] and certificate["target"] == "numpy"
    assert certificate["logits"]["relative"] <= certificate["tolerance"] == 1e-5
    assert len(certificate["blocks"]) == 2 and certificate["prompts_of_held_out_text"] == 16
    assert certificate["tokens"] == certificate["equal_tokens"] > 100
    assert certificate["origin"]["run"] == "../run" and certificate["origin"]["step"] == 4
    dropped = certificate["dropped"]
    assert dropped["parts"] == {"echo": 2} and dropped["text"].endswith("held-out documents")
    assert dropped["bits_per_byte_before"] != dropped["bits_per_byte_after"]
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("Open `out/model.npz`.", "| layers | 2 |", "attention_name: louder", "1e-05"):
        assert part in card
    assert str(tmp_path) not in card and left(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.npz").stat().st_mode & 0o777 == 0o644

    code, out, err = export("--verify", "out", "--json")
    assert code == 0 and json.loads(out)["logits"] == certificate["logits"], err
    with (tmp_path / "out" / "model.npz").open("ab") as file:
        file.write(b"x")
    code, _, err = export("--verify", "out")
    assert code == 1 and "files have changed since the export: model.npz" in err
    shutil.move(tmp_path / "out", tmp_path / "elsewhere" / "out")
    code, _, err = export("--verify", "elsewhere/out")
    assert code == 2 and "is not there" in err and "--verify elsewhere/out RUN" in err


def test_what_no_plain_form_holds_is_refused_with_the_option_that_drops_it(
    run: Path, export: Export, tmp_path: Path
) -> None:
    code, _, err = export(run, "--to", "numpy", "-o", "out")
    assert code == 2 and "blocks.0.attention (and 1 more): an echo of the input" in err
    assert "--drop echo leaves it out" in err
    code, _, err = export(run, "--to", "numpy", "-o", "out", "--drop", "ecko")
    assert code == 2 and "the model has no ecko to drop (did you mean 'echo'?)" in err
    assert left(tmp_path) == []


def test_mistakes_are_told_at_once(run: Path, export: Export) -> None:
    code, _, err = export(run, "--unproven", "--push", "a b/c", "--public", "-O", "dtype")
    assert code == 2 and "3 problems" in err
    assert all(text in err for text in ("--to: names no target", "--unproven", "no KEY=VALUE"))
    code, _, err = export("--verify", "out", "--to", "numpy", "--force", "--step", 2)
    assert code == 2 and "3 problems" in err and "--step: does not go with --verify" in err
    code, _, err = export(run, "--to", "elsewhere", "-O", "type=Q8_0", *DROP)
    assert code == 2 and "elsewhere cannot be written here" in err
    code, _, err = export(run, "--to", "bare", "-O", "type=Q8_0", *DROP)
    assert code == 2 and "--option type: bare has no settings" in err
    code, _, err = export(run, "--to", "numpy", "-O", "fault=leak", *DROP)
    assert code == 2 and "--option fault: must be 'none', 'heads'" in err
    code, _, err = export(run, "--to", "numpi")
    assert code == 2 and "did you mean 'numpy'?" in err
    code, _, err = export(run, "--to", "numpy", "-O", "folt=none", *DROP)
    assert code == 2 and "--option folt: unknown key (did you mean 'fault'?)" in err


def test_progress_is_told_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with progress(lambda: now[0]) as tell:
        for now[0] in (1.0, 14.0, 15.0, 16.0, 29.0, 31.0):
            tell(f"at {now[0]:g} s")
    assert capsys.readouterr().err.splitlines() == ["at 15 s", "at 31 s"]


def test_a_folder_that_is_not_empty_is_replaced_by_force_if_it_is_an_export(
    run: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("-o", "out")
    arguments = (run, "--to", "numpy", *DROP, *UNPROVEN)
    (tmp_path / "out").mkdir()
    assert export(*arguments, *where)[0] == 0
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert (
        not certificate["proven"] and "nothing-at-all is not installed" in certificate["unproven"]
    )
    assert "**Unproven**" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "out" / "old").touch()
    code, _, err = export(*arguments, *where)
    assert code == 2 and "is not empty" in err and "--force" in err
    assert export(*arguments, *where, "--force")[0] == 0 and not (tmp_path / "out" / "old").exists()
    (tmp_path / "out" / "certificate.json").unlink()
    code, _, err = export(*arguments, *where, "--force")
    assert code == 2 and "replaces nothing but exports" in err
    for inside in (".", "checkpoints", "tokenizer", "exports", "../run/new"):
        before = sorted(run.rglob("*"))
        code, _, err = export(*arguments, "-o", run / inside, "--force")
        assert (code == 2 and "inside the run's own folder" in err) or "replaces nothing" in err
        assert sorted(run.rglob("*")) == before
    assert export(*arguments, "-o", run / "exports" / "mine")[0] == 0
    (tmp_path / "file").touch()
    code, _, err = export(*arguments, "-o", "file", "--force")
    assert code == 2 and "is no folder" in err
    code, _, err = export(*arguments, "-o", "file/below")
    assert code == 2 and "is no folder" in err
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        code, _, err = export(*arguments, "-o", "new/out")
    assert code == 2 and f"cannot be written: {tmp_path} is not yours" in err
    assert left(tmp_path) == ["file", "out"]


def test_a_program_that_is_not_there_is_named(run: Path, export: Export, tmp_path: Path) -> None:
    code, _, err = export(run, "--to", "numpy", *DROP, "-o", "out", "-O", "requires=nothing-at-all")
    assert code == 2 and "nothing-at-all is not installed" in err
    assert "--unproven exports it without a proof" in err and left(tmp_path) == []
    assert "unproven: numpy cannot run it here: nothing-at-all" in err
    code, _, err = export(run, "--to", "elsewhere", *DROP, "-o", "out")
    assert code == 2 and "elsewhere cannot be written here: nothing-writes-it is not" in err


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("heads", "block 1 is the first that differs"),
        ("crash", "RuntimeError: this file has no sense at all"),
        ("full", "the export cannot be written: No space left on device"),
    ],
)
def test_nothing_is_left_of_an_export_that_fails(
    run: Path, export: Export, tmp_path: Path, fault: str, told: str
) -> None:
    code, _, err = export(run, "--to", "numpy", *DROP, "-o", "new/out", "-O", f"fault={fault}")
    assert code == 1 and told in err
    assert left(tmp_path) == [] and not (run / "exports").exists()


def test_what_a_killed_export_leaves_is_removed_by_the_next(
    run: Path, export: Export, tmp_path: Path, forked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "run" / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    code = "from apt_plugins.export.command import main; main()"
    words = [str(run), "--to", "numpy", *DROP, "-o", "out", "--plugin", str(PLUGIN)]
    command = [sys.executable, "-c", code, *words, "-O"]
    assert subprocess.run([*command, "fault=stopped"], cwd=tmp_path).returncode == 143
    assert left(tmp_path) == []
    for fault in ("killed", "orphaned"):
        assert subprocess.run([*command, f"fault={fault}"], cwd=tmp_path).returncode == -9
        [hidden] = left(tmp_path)  # that of the one before is gone
        assert hidden.startswith(".out.") and not (tmp_path / "out").exists()
    assert len(left(temporary)) == 1
    assert export(run, "--to", "numpy", *DROP, "-o", "out")[0] == 0
    assert left(tmp_path) == ["out"] and left(temporary) == []


def test_an_export_replaces_nothing_that_came_meanwhile_and_a_killed_one_loses_nothing(
    tmp_path: Path,
) -> None:
    with staged(tmp_path / "out", force=False) as (folder, publish):
        (folder / "mine").touch()
        with staged(tmp_path / "out", force=False) as (other, publish_other):
            (other / "certificate.json").touch()
            publish_other()
        with pytest.raises(ConfigError, match="is there, and is not empty"):
            publish()
    (tmp_path / "out").rename(tmp_path / ".out.0123abcd.replaced")  # killed just after that
    with staged(tmp_path / "out", force=True) as (folder, publish):
        assert (tmp_path / "out" / "certificate.json").exists()
        (folder / "mine").touch()
        publish()
    (tmp_path / ".out.0123abcd.replaced").mkdir()
    with staged(tmp_path / "out", force=True):
        pass
    assert left(tmp_path) == ["out"] and left(tmp_path / "out") == ["mine"]


def test_an_unfinished_run_is_exported_if_its_step_is_named(
    run: Path, export: Export, tmp_path: Path
) -> None:
    path = run / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "failed"}))
    arguments = ("--to", "numpy", *DROP, *UNPROVEN)
    code, _, err = export(run, *arguments)
    assert code == 2 and "unfinished: failed, with a checkpoint of step 4" in err
    assert "--step 4 exports" in err
    code, out, _ = export(run, "--step", 2, *arguments)
    assert code == 0 and out == f"{run}/exports/numpy\n"
    shutil.rmtree(run / "checkpoints")
    code, _, err = export(run, *arguments)
    assert code == 2 and "no checkpoint" in err


def test_the_weights_that_are_named_are_exported(run: Path, export: Export, tmp_path: Path) -> None:
    import numpy as np

    found = {}
    for weights in ("last", "average", "best"):
        code, _, err = export(run, "--to", "numpy", *DROP, "-o", weights, "--weights", weights)
        assert code == 0, err
        found[weights] = np.load(tmp_path / weights / "model.npz")["embedding"]
    code, _, err = export("--verify", "best")
    assert code == 0, err
    assert not np.array_equal(found["last"], found["average"])
    assert np.array_equal(found["best"], found["average"])  # of step 4, which is the best


class Hub:
    """Stands in for huggingface_hub's HfApi."""

    def __init__(self, fails: bool = False, **options: Any) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._fails = fails

    def create_repo(self, name: str, **options: Any) -> Any:
        self.calls.append((name, options))
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, **options: Any) -> Any:
        if self._fails:
            raise ConnectionError("no route\nto host")
        files = sorted(path.name for path in options["folder_path"].iterdir())
        self.calls.append((options["repo_id"], {"files": files}))
        return SimpleNamespace(commit_url="https://hub/commit")


def test_an_export_is_pushed_once_it_is_proven(
    run: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="what pushes is not installed")
    api = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda **options: api)
    arguments = (run, "--to", "numpy", *DROP, "-o", "out", "--push", "tiny")
    code, _, err = export(*arguments)
    assert code == 0 and "pushed: https://hub/commit" in err
    assert api.calls == [
        ("tiny", {"private": True, "exist_ok": True}),
        ("me/tiny", {"files": ["README.md", "certificate.json", "model.npz"]}),
    ]
    api = Hub()
    code, _, err = export(*arguments, "--force", "-O", "fault=heads")
    assert code == 1 and not api.calls
    api = Hub(fails=True)
    code, _, err = export(*arguments, "--force", "--public")
    assert (
        code == 1 and "out is written; pushing it to tiny failed: ConnectionError: no route" in err
    )
    assert api.calls[0][1]["private"] is False and left(tmp_path) == ["out"]


def test_a_certificate_names_no_plugin_that_is_imported(
    run: Path, export: Export, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert export(run, "--to", "numpy", *DROP, "-o", "out")[0] == 0
    code = run_command(app, "apt-export", ["--verify", "out"])
    err = capfd.readouterr().err
    assert code == 2 and f"--plugin {PLUGIN}" in err
    code, _, err = export("--verify", "run")
    assert code == 2 and "there is no certificate.json" in err
    (tmp_path / "out" / "certificate.json").write_text("[1]")
    code, _, err = export("--verify", "out")
    assert code == 2 and "is no certificate" in err


def test_what_is_being_done_is_told(run: Path, tmp_path: Path) -> None:
    session = open_run(run, device="cpu", plugins=["export", str(PLUGIN)])
    told: list[str] = []
    order = Order(
        "numpy", tmp_path / "out", origin_of(session, tmp_path, "last", ()), drop=["echo"]
    )
    export_session(session, order, text=lambda: HeldOutText(session), tell=told.append)
    expected = [
        "reading held-out text", "scoring the model", "scoring the model without echo", "block 1",
        "numpy: prompt 1 of 21", "comparing prompt 21 of 21", "comparing block 2 of 2 at prompt 21",
        "comparing greedy texts", "comparing the tokenizer",
    ]  # fmt: skip
    places = [told.index(each) for each in expected]
    assert places == sorted(places)
