"""Checkpoints of earlier versions are read: what came later has a default."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from apt_core.runs.run_state import ALWAYS, Progress, RunState

FIRST: dict[str, Any] = {
    "step": 8,
    "epoch": 2,
    "ended_epochs": 1,
    "tokens": 2048,
    "start_scores": {"loss": 5.5},
    "scores": {"loss": 5.25, "step": 8},
    "metrics": {"loss": 5.125},
    "timeline": [{"plugin": "moe", "event": "enabled", "epoch": 2, "step": 4}],
    "transforms": [{"plugin": "moe", "epoch": 2, "step": 4, "loss_before": 5.5, "loss_after": 5.5}],
    "windows_per_step": 2,
    "nonfinite_steps": [0, 0],
    "modes": {"at_start": {"parameter a": True, "module ": True}, "now": {"parameter a": False}},
    "stopping": {"watched": "loss", "reference": None, "since": 0, "judged_step": 0},
    "precision": "torch.float32",
    "data_sha256": "0" * 64,
    "plugins": {"moe": {"seen": 1}},
    "plugin_records": {
        "moe": {
            "state": "active",
            "reason": "",
            "failures": [
                {
                    "plugin": "moe",
                    "hook": "on_step_end",
                    "step": 3,
                    "error": "KeyError: 'a'",
                    "where": "moe.py:3",
                    "count": 1,
                    "quarantined": False,
                }
            ],
        }
    },
    "optimizer_groups": [
        {"parameters": ["a"], "settings": {"eps": 1e-8}, "plan": {"lr": 0.5, "betas": [0.9, 0.5]}}
    ],
    "averages": [{"plugin": "core", "decay": 0.5}],
}
"""The state in the first checkpoints of format 1, with a row of each kind: not to be added to.
A key that comes later needs a default."""


def test_the_first_checkpoints_are_read() -> None:
    state = RunState.from_json(FIRST)
    assert state.step == 8 and state.trainable == [] and state.modes.staged == []
    assert RunState.from_json(state.to_json()) == state
    assert FIRST.keys() == ALWAYS


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """``model`` and those of its fields, and of theirs."""
    yield model
    for field in model.model_fields.values():
        rest = [field.annotation]
        while rest:
            kind: Any = rest.pop()
            rest += getattr(kind, "__args__", ())
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from models(kind)


def test_the_first_checkpoints_have_a_row_of_each_kind() -> None:
    """A kind without a row is not held by the test above; one that came later needs no row, for
    nothing of it is in them."""
    later = {"Look", "Trainable", "Change"}
    seen: set[str] = set()

    def visit(model: Any) -> None:
        if isinstance(model, BaseModel):
            seen.add(type(model).__name__)
            rest = [getattr(model, name) for name in type(model).model_fields]
        else:
            rest = [*model.values()] if isinstance(model, dict) else [*model]
        for value in rest:
            if isinstance(value, BaseModel | dict | list):
                visit(value)

    visit(RunState.from_json(FIRST))
    assert {model.__name__ for model in models(RunState)} == seen | later


@pytest.mark.parametrize("key", sorted(ALWAYS & Progress.model_fields.keys()))
def test_a_key_that_every_checkpoint_has_may_not_be_missing(key: str) -> None:
    state = copy.deepcopy(FIRST)
    del state[key]
    with pytest.raises(ValueError, match=f"it has no {key}"):
        RunState.from_json(state)
