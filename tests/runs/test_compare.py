"""The comparison of two runs sees every bit, and says where the first one differs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from apt_core.errors import CheckpointError
from apt_core.runs.checkpoint import Checkpoint
from apt_core.runs.compare import compare_checkpoints, compare_runs
from apt_core.testing import tiny_run

NAN = float("nan")


class State:
    """The state of a checkpoint, as far as the comparison asks for it."""

    step, averages = 7, ()

    def __init__(self, values):
        self.values = {"step": 7, "spent": {"seconds": 1}, **values}

    def to_json(self):
        return self.values


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with these tensors of the model; ``state`` and ``plugins`` beside them."""
    made = iter(range(100))

    def make(model, state=None, plugins=None):
        path = tmp_path / f"checkpoint-{next(made)}"
        path.mkdir()
        save_file(model, path / "model.safetensors")
        return Checkpoint(path, State(state or {}), plugins or {}, "", {})

    return make


def test_tensors_are_compared_by_their_bytes(saved):
    weights = {"a": torch.tensor([[1.0, NAN], [0.0, 2.0]]), "s": torch.tensor(1.0)}
    same = compare_checkpoints(saved(weights), saved({k: v.clone() for k, v in weights.items()}))
    assert same.differences == []
    assert same.compared == ["2 tensors of model", "the rest of the state"]
    other = {"a": torch.tensor([[1.0, NAN], [-0.0, 3.0]]), "s": torch.tensor(1.5)}
    found = compare_checkpoints(saved(weights), saved(other), names=("here", "there"))
    assert [str(each) for each in found.differences] == [
        "model: a: 2 of 4 values, the first at [1, 0]: 0.0 here, -0.0 there",
        "model: s: 1 of 1 values, the first at []: 1.0 here, 1.5 there",
    ]


@pytest.mark.parametrize(
    ("other", "detail"),
    [
        ({"a": torch.zeros(2, 1)}, "float32 [2] in the first, float32 [2, 1] in the second"),
        ({"a": torch.zeros(2).half()}, "float32 [2] in the first, float16 [2] in the second"),
        ({"b": torch.zeros(2)}, "only in the first"),
    ],
)
def test_types_shapes_and_names_count(saved, other, detail):
    found = compare_checkpoints(saved({"a": torch.zeros(2)}), saved(other)).differences
    assert str(found[0]) == f"model: a: {detail}"


def test_all_of_the_state_counts_but_what_is_of_the_machine(saved):
    weights = {"a": torch.zeros(1)}
    one = saved(
        weights,
        {"scores": {"x": NAN}, "plugins": {"p": {"n": 1}}, "metrics": {"mfu": 1, "p/m": 1},
         "modes": {"a": True}},
        {"p.seen#0": torch.zeros(1)},
    )  # fmt: skip
    other = saved(
        weights,
        {"scores": {"x": NAN}, "plugins": {"p": {"n": 2}, "q": {}}, "metrics": {"p/m": 2},
         "spent": {"seconds": 2}, "modes": {"a": False}},
        {"p.seen#0": torch.ones(1)},
    )  # fmt: skip
    found = compare_checkpoints(one, other).differences
    assert [(each.what, each.foreign) for each in found] == [
        ("plugins: p.seen#0", False),
        ("the state of plugin p", False),
        ("the state of plugin q", False),
        ("the state: metrics: p/m", True),
        ("the state: modes", False),
    ]
    assert {each.step for each in found} == {7}


@pytest.fixture
def runs(tmp_path):
    """Two folders of the same run."""
    tiny_run(steps=4, output=tmp_path / "one", overrides={"training.log_every_steps": 1})
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    return tmp_path / "one", tmp_path / "other"


def test_rows_are_compared_from_the_first_step_on(runs):
    one, other = runs
    same = compare_runs(one, other)
    assert same.differences == []
    path = other / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    training = {row["step"]: row for row in rows if "loss" in row}
    training[2] |= {"loss": -1.0, "tokens_per_s": -1.0, "a_plugin/x": 1.0}
    training[4] |= {"loss/term": 1.0}
    rows.remove(training[3])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    found = compare_runs(one, other).differences
    assert [(each.step, each.what, each.foreign) for each in found] == [
        (0, "metrics.jsonl", False),
        (2, "a_plugin/x after step 2", True),
        (2, "loss after step 2", False),
        (3, "the row of training after step 3", False),
        (4, "loss/term after step 4", False),
    ]
    late = compare_runs(one, other, after=3, step=4)
    assert [each.what for each in late.differences] == ["metrics.jsonl", "loss/term after step 4"]
    assert late.compared[-1].endswith("rows of metrics after step 3")


def test_a_run_without_checkpoints_is_an_error(runs):
    one, other = runs
    shutil.rmtree(other / "checkpoints")
    with pytest.raises(CheckpointError, match="there is no checkpoint in it"):
        compare_runs(one, other)
