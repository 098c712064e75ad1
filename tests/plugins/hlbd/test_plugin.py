"""The plugin hlbd in a run: what it writes of trained and of held-out tasks."""

from __future__ import annotations

import json

import pytest

from apt_core import ConfigError
from apt_core.providers import Question
from apt_core.testing import TINY_PROFILE, tiny_run
from apt_plugins.hlbd.task import HLBDTask

WORDS = {
    "sun": ("1f", "sole"), "moon": ("2q", "luna"), "fire": ("3x", "fuoco"), "sea": ("4k", "mare"),
    "dog": ("5z", "cane"), "cat": ("6j", "gatto"), "star": ("7v", "stella"),
}  # fmt: skip


def profile(path, **data):
    return {
        **TINY_PROFILE,
        "model": {**TINY_PROFILE["model"], "d_model": 32, "max_seq_len": 24},
        "data": {"loader": "hlbd", "train_path": str(path), "val_fraction": 0.3, **data},
        "hlbd": {"every_epochs": 2, "batch_size": 5},
    }


@pytest.fixture
def samples(tmp_path, monkeypatch):
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "samples.json"
    rows = [
        {"concept": word, "level_1": word, "level_2": code, "level_3": name}
        for word, (code, name) in WORDS.items()
    ]
    path.write_text(json.dumps(rows))
    return path


def test_the_tasks_of_both_sides_are_scored_apart(samples, tmp_path):
    run = tiny_run(
        "hlbd",
        profile=profile(samples),
        overrides={"training.max_epochs": 3, "training.learning_rate": 3e-3},
        output=tmp_path / "run",
    )
    scores = json.loads((tmp_path / "run" / "hlbd.json").read_text())
    assert scores["step"] == run.result.step
    trained, held_out = scores["trained"], scores["held_out"]
    # All six tasks of a concept are on one side.
    assert trained["tasks"] + held_out["tasks"] == len(WORDS) * 6
    assert trained["tasks"] % 6 == held_out["tasks"] % 6 == 0 < held_out["tasks"]
    for side in (trained, held_out):
        assert set(side["by_task"]) == {"1>2", "1>3", "2>1", "2>3", "3>1", "3>2"}
        assert {each["tasks"] for each in side["by_task"].values()} == {side["tasks"] // 6}
    rows = [row for row in run.metrics if "hlbd/trained_exact_match" in row]
    assert [row["epoch"] for row in rows] == [3]
    assert 0 <= rows[0]["hlbd/held_out_character_f1"] <= 1


def test_held_out_tasks_are_a_task_of_evaluations(samples, tmp_path):
    changes = {"evaluation.tasks": ["hlbd"], "evaluation.best_by": "task/hlbd/character_f1"}
    run = tiny_run("hlbd", profile=profile(samples), overrides=changes, steps=2)
    figures = run.result.figures
    names = [f"task/hlbd/{name}" for name in ("exact_match", "character_f1", "level_form")]
    assert all(0 <= figures[name] <= 1 for name in names)
    task = HLBDTask()
    item = Question("1>5 火\n", "fire")
    right = {"exact_match": 1.0, "character_f1": 1.0, "level_form": 1.0}
    assert task.score(item, "fire") == right
    assert task.score(item, "火") == dict.fromkeys(right, 0.0)


def test_a_profile_without_such_a_source_is_refused(samples):
    with pytest.raises(ConfigError, match="no source of the profile is hlbd"):
        tiny_run("hlbd", profile=profile(samples, loader="text_default"))
