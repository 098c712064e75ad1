"""What a transform says of moved modules, of sizes and of ids is checked against the models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from apt_core.modeling import Carried, ModelTransform
from apt_core.modeling.carry import carry_optimizer_state, materialize

BEFORE = {"0.weight": torch.Size((2, 2)), "1.weight": torch.Size((2, 2))}


def three() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"moved": {"2": "1", "7": "0"}}, "moved: the new model has no module 7"),
    ({"moved": ["2"]}, "moved is no mapping from names"),
    ({"moved": {"2": 1}}, "moved is no mapping to names"),
    ({"moved": {"1": "0"}}, "nothing is made of the old 1.weight"),
    ({"model_settings": [1]}, "model_settings is no mapping from names"),
    ({"compared_ids": 0}, "compared_ids is 0, not a number of ids"),
    ({"compared_ids": True}, "compared_ids is True, not a number of ids"),
    (
        {"origins": {"2.weight": Carried("0.weight", others=("9.weight",))}},
        "2.weight comes from 9.weight, which the old model has not",
    ),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_does_not_fit_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ModelTransform(three(), **fields).check(BEFORE)


def test_a_copy_has_values_modes_and_state_of_its_own() -> None:
    """Two that share the state of an optimizer would both step it."""
    old = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(2)))
    optimizer = torch.optim.AdamW(old.parameters())
    old(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    old[1].eval()
    transform = ModelTransform(three(), moved={"1": "0", "2": "1"})
    transform.check(BEFORE)
    assert [transform.old_name(name) for name in ("1.weight", "2", "10.x")] == [
        "0.weight",
        "1",
        "10.x",
    ]
    new = materialize(transform, old, seed=0, num_layers=1)
    assert [module.training for module in new] == [True, True, False]
    assert new[1].weight.equal(old[0].weight) and new[2].weight.equal(old[1].weight)
    fresh = torch.optim.AdamW(new.parameters())
    moments = {"exp_avg": 1, "exp_avg_sq": 2}
    carry_optimizer_state(transform, old, optimizer, new, fresh, moments)
    states = [fresh.state[module.weight] for module in new]
    for key in moments:
        assert states[0][key].equal(states[1][key])
        assert states[0][key].data_ptr() != states[1][key].data_ptr()
