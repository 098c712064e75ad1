"""``apt-eval``: scores of runs, side by side, kept in their folders."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from apt_core.cli.eval import app
from apt_core.secrets import MASK
from tests.cli.conftest import Command

pytest.importorskip("torch", reason="scores are computed with torch")

MINE = """
kind: choices
items:
  - {prompt: "Line", choices: [" 1", " of"], answer: 0}
  - {prompt: "a", choices: ["a", "b"], answer: 0}
"""

ONE = """
from pydantic import BaseModel
from apt_core import SectionSpec, hookimpl

class Settings(BaseModel):
    size: int = 1
    shape: str = "round"
    api_key: str = ""

@hookimpl
def apt_register_config():
    return [SectionSpec("one", Settings, schedule_params=("warmth",))]
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, of which the second has trained longer on the same text."""
    from apt_core.testing import tiny_run

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runs")
        patch.setenv("APT_CACHE", str(folder / "cache"))
        text = {"data.train_path": str(folder / "short.txt"), "training.ema_decay": 0.5}
        tiny_run(steps=3, output=folder / "short", overrides={"training.ema_decay": 0.5})
        tiny_run(steps=20, output=folder / "long", overrides={**text, "training.max_epochs": 3})
    return folder


@pytest.fixture
def runs(trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runs in the working directory."""
    monkeypatch.setenv("APT_CACHE", str(trained / "cache"))
    for name in ("short", "long"):
        shutil.copytree(trained / name, folder / "runs" / name)
    return folder


def test_runs_are_scored_side_by_side_and_scores_are_kept(runs: Path, command: Command) -> None:
    (runs / "mine.yaml").write_text(MINE)
    tasks = ["--tasks", "mine.yaml,held_out", "--tasks", "completion", "--limit", "9"]
    outcome = command(app, "runs/short", "runs/long", *tasks, "--json", prog="apt-eval").json
    assert [run["step"] for run in outcome["runs"]] == [3, 20]
    for run in outcome["runs"]:
        scores = {row["task"]: row for row in run["scores"]}
        assert [*scores] == ["mine", "held_out", "completion"]
        assert (scores["completion"]["items"], scores["completion"]["total"]) == (9, 44)
        row = scores["held_out"]
        assert row["metrics"]["bits_per_byte"]["method"] == "bootstrap"
        assert (row["units"], row["context"], row["stride"]) == ("windows", 16, 8)
        assert (row["precision"], row["device"], row["batch_size"]) == ("float32", "cpu", 16)
        assert row["weights"] == "last" and row["versions"]["torch"]
        kept = json.loads((runs / run["run"] / "scores.json").read_text())["scores"]
        assert kept == run["scores"]
    differences = {(d["task"], d["metric"]): d for d in outcome["differences"]}
    found = differences["held_out", "bits_per_byte"]
    values = [run["scores"][1]["metrics"]["bits_per_byte"]["value"] for run in outcome["runs"]]
    assert found["value"] == pytest.approx(values[1] - values[0])
    assert found["low"] < found["value"] < found["high"] < 0  # it has learned something
    assert differences["completion", "accuracy"]["method"] == "agresti-min"

    (runs / "one.py").write_text(ONE)
    asked = "--batch-size", "2", "--stride", "16", "--plugin", "one.py"
    asked = *asked, "--set", "one.size=3", "--set", "one.api_key=abc", "--set", "schedules.warmth=2"
    outcome = command(app, *asked, prog="apt-eval")
    assert (outcome.code, outcome.err) == (0, "run: runs/long\n"), "the newest one is meant"
    assert "held_out  bits_per_byte" in outcome.out and "long step 20" in outcome.out
    assert "stride 16, batch size 2, float32 on cpu; 95 % by bootstrap over windows" in outcome.out
    kept = json.loads((runs / "runs/long/scores.json").read_text())["scores"]
    assert [row["plugins"] for row in kept] == [[], [], [], ["one"]]
    assert kept[0]["settings"] == kept[0]["overrides"] == {}
    assert kept[3]["settings"] == {"one": {"size": 3, "shape": "round", "api_key": MASK}}
    set_ = {"one.size": 3, "one.api_key": MASK, "schedules.warmth": 2}
    assert kept[3]["overrides"] == set_


def test_a_text_a_step_and_weights_may_be_named(runs: Path, command: Command) -> None:
    (runs / "a.txt").write_text("Line 1 of a small text")
    (runs / "b.txt").write_text("火")
    options = ["--text", "a.txt", "--text", "b.txt", "--weights", "average"]
    outcome = command(app, "runs/long/checkpoints", *options, "--json", prog="apt-eval").json
    (row,) = outcome["runs"][0]["scores"]
    assert (row["task"], row["items"], row["weights"]) == ("text", 2, "average")
    assert row["metrics"]["perplexity"]["low"] is None  # two documents are too few
    step = sorted(path.name for path in (runs / "runs/long/checkpoints").iterdir())[0]
    number = str(int(step.removeprefix("step-")))
    outcome = command(app, "long", "--step", number, "--text", "a.txt", prog="apt-eval")
    assert outcome.code == 0 and f"step {number}" in outcome.out
    assert len(json.loads((runs / "runs/long/scores.json").read_text())["scores"]) == 2


def test_what_cannot_be_scored_is_refused(runs: Path, command: Command) -> None:
    (runs / "empty").mkdir()
    (runs / "bad.txt").write_bytes(b"ab\xff")
    (runs / "none.txt").write_bytes(b"")
    (runs / "mine.yaml").write_text(MINE.replace("answer: 0", "answer: 5"))
    cases = [
        (["--tasks", "completio"], 2, "--tasks: no plugin offers task provider 'completio' (did"),
        (["--tasks", " , "], 2, "--tasks: names no task"),
        (["--tasks", "mine.yaml"], 2, "mine.yaml:4: items[0].answer: is 5, and there are 2"),
        (["--tasks", "reasoning_quality"], 2, "has no items (the run's held-out documents have"),
        (["--weights", "bset"], 2, "--weights: is 'bset' (did you mean 'best'?)"),
        (["--stride", "17"], 2, "--stride: is 17, more than the context of 16 tokens (give 1 to"),
        (["--text", "bad.txt"], 2, "bad.txt: --text: byte 2 is no UTF-8"),
        (["--text", "none.txt"], 2, "none.txt: --text: is empty"),
        (["--text", "missing.txt"], 2, "missing.txt: --text: No such file"),
        (["--step", "5"], 2, "there is no checkpoint of step 5"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--set", "model.d_model=8"], 2, "model.d_model: is the run's own: only what belongs to"),
        (["--set", "no_key"], 2, "--set"),
        (["nowhere"], 2, "nowhere: RUN: there is no such run"),
        (["empty"], 2, "there is no checkpoint in this folder"),
    ]
    for arguments, code, message in cases:
        outcome = command(app, *arguments, prog="apt-eval")
        assert (outcome.code, outcome.out) == (code, ""), arguments
        assert message in outcome.err, f"{arguments}: {outcome.err}"
    assert not [*runs.glob("runs/*/scores.json")]


def test_data_and_scores_that_are_not_what_they_were_are_told(runs: Path, command: Command) -> None:
    (runs / "runs/long/scores.json").write_text("{")
    manifest = json.loads((runs / "runs/long/manifest.json").read_text())
    manifest["data"]["sha256"] = "0" * 64
    (runs / "runs/long/manifest.json").write_text(json.dumps(manifest))
    outcome = command(app, "runs/long", prog="apt-eval")
    assert outcome.code == 0 and "bits_per_byte" in outcome.out
    assert "the documents of the run have changed since" in outcome.err
    assert "warning: the scores are not kept" in outcome.err
    assert (runs / "runs/long/scores.json").read_text() == "{"


def test_the_harness_is_asked_for_by_name(
    runs: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, message in (
        (["--lm-eval", "a", "--tasks", "completion"], "--lm-eval goes without --tasks and --text"),
        (["--include-path", "a"], "--include-path goes with --lm-eval"),
        (["--lm-eval", ","], "--lm-eval: names no task"),
    ):
        outcome = command(app, *arguments, prog="apt-eval")
        assert (outcome.code, outcome.out) == (2, "") and message in outcome.err
    monkeypatch.setattr("apt_core.cli.eval.find_spec", lambda name: None)
    outcome = command(app, "--lm-eval", "a", prog="apt-eval")
    assert outcome.code == 2 and 'pip install "apt-kernel[lm_eval]"' in outcome.err

    module = ModuleType("apt_core.evaluation.lm_eval_model")
    module.HarnessTasks = Harness  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("apt_core.cli.eval.find_spec", lambda name: module)
    outcome = command(app, "long", "--lm-eval", "a,b", "--limit", "2", prog="apt-eval")
    assert (outcome.code, outcome.err) == (0, "run: runs/long\n")
    assert "lm_eval/a  acc     0.500 [0.400, 0.600]" in outcome.out
    kept = json.loads((runs / "runs/long/scores.json").read_text())["scores"]
    assert [row["task"] for row in kept] == ["lm_eval/a", "lm_eval/b"]
    assert kept[0]["weights"] == "last" and kept[0]["stride"] == 8 and kept[0]["step"] == 20


class Harness:
    """In the place of the harness, which takes long to import."""

    def __init__(self, names: list[str], include: list[Path]) -> None:
        assert include == []
        self.names = names

    def score(self, session: Any, asking: Any, limit: int) -> Iterator[Any]:
        from apt_core.evaluation.metrics import Figure

        more = {"items": limit, "total": 9, "context": 16, "stride": 8, "batch_size": 16}
        for name in self.names:
            figures = {"acc": Figure(0.5, 0.4, 0.6, "normal")}
            yield name, figures, {**more, "precision": "float32"}
