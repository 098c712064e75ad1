"""``scores.json``: scores are added, kept, and never guessed."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from apt_core.errors import CheckpointError
from apt_core.runs.task_scores import SCORES, add_scores, read_scores


def row(task="a", value=0.5, **more):
    return {"task": task, "metrics": {"accuracy": {"value": value}}, "step": 3, **more}


def test_scores_are_added_to_earlier_ones(tmp_path):
    assert read_scores(tmp_path) == []
    add_scores(tmp_path, [row(versions={"apt": "1"}, later={"x": 1}), row("é", math.inf)])
    add_scores(tmp_path, [row("b", math.nan)])
    first, second, third = read_scores(tmp_path)
    assert (first.task, first.step, first.versions) == ("a", 3, {"apt": "1"})
    assert first.metrics["accuracy"].value == 0.5 and first.metrics["accuracy"].low is None
    assert (second.task, second.metrics["accuracy"].value) == ("é", math.inf)
    assert math.isnan(third.metrics["accuracy"].value)
    data = json.loads((tmp_path / SCORES).read_text(encoding="utf-8"))
    assert data["version"] == 1 and data["scores"][0]["later"] == {"x": 1}
    with ThreadPoolExecutor(4) as pool:
        [*pool.map(lambda n: add_scores(tmp_path, [row(f"{n}")]), range(8))]
    assert len(read_scores(tmp_path)) == 11
    assert [path.name for path in tmp_path.iterdir()] == [SCORES]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "has no scores; move it away"),
        ('{"version": 2, "scores": []}', "is of version 2, written by a later APT"),
        ('{"version": 1, "scores": {}}', "has no scores"),
        ('{"version": 1, "scores": [{"task": 3, "metrics": {}}]}', "task: "),
        ('{"version": 1, "scores": [{"task": "a", "metrics": {"b": {}}}]}', r"metrics.b.value"),
    ],
)
def test_a_damaged_file_is_left_as_it_is(tmp_path, text, message):
    (tmp_path / SCORES).write_text(text)
    for act in (lambda: read_scores(tmp_path), lambda: add_scores(tmp_path, [row()])):
        with pytest.raises(CheckpointError, match=message):
            act()
    assert (tmp_path / SCORES).read_text() == text
