"""What every optimizer must do."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apt_core.testing.conformance.checks import Check
from apt_core.testing.conformance.layers import sample

RATE = 1e-2


def optimizer_checks(provider: Any) -> list[Check]:
    """The checks of an optimizer provider."""
    return [
        Check("builds", lambda: _builds(provider)),
        Check("rates", lambda: _rates(provider)),
        Check("step", lambda: _step(provider)),
        Check("no gradient", lambda: _no_gradient(provider)),
        Check("state dict", lambda: _state_dict(provider)),
    ]


def _weights() -> list[nn.Parameter]:
    return [nn.Parameter(sample(6, 4)), nn.Parameter(sample(4, seed=1))]


def _optimizer(provider: Any, weights: list[nn.Parameter], factor: float = 1.0) -> Optimizer:
    """An optimizer of a group a weight, with ``factor`` times the usual rates."""
    separates = getattr(provider, "separates_matrices", False)
    groups: list[dict[str, Any]] = []
    for weight in weights:
        if separates and weight.ndim >= 2:
            groups.append({"params": [weight], "hidden_matrices": True, "lr_scale": factor})
        else:
            own = {} if factor == 1.0 else {"lr": RATE * factor}
            groups.append({"params": [weight], **own})
    return provider.create(groups, learning_rate=RATE, weight_decay=0.0)


def _loss(weights: list[nn.Parameter]) -> Tensor:
    return torch.stack([(weight - 3).square().sum() for weight in weights]).sum()


def _take_step(optimizer: Optimizer, weights: list[nn.Parameter]) -> None:
    optimizer.zero_grad()
    _loss(weights).backward()
    optimizer.step()


def _builds(provider: Any) -> None:
    weights = _weights()
    optimizer = _optimizer(provider, weights)
    assert isinstance(optimizer, Optimizer), f"{type(optimizer).__name__} is no torch Optimizer"
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert held == {id(weight) for weight in weights}, "it holds other parameters than it was given"


def _rates(provider: Any) -> None:
    """A group has the peak rate or its own, and follows what the schedule writes into it."""
    usual = [group["lr"] for group in _optimizer(provider, _weights()).param_groups]
    if not getattr(provider, "separates_matrices", False):
        assert set(usual) == {RATE}, f"groups of the rate {RATE} have {set(usual)}"
    for factor in (1.0, 0.25):
        weights = _weights()
        optimizer = _optimizer(provider, weights, factor)
        found = [group["lr"] for group in optimizer.param_groups]
        expected = [rate * factor for rate in usual]
        assert found == expected, f"groups of the rates {expected} have {found}"
        for held in optimizer.param_groups:
            held["lr"] = 0.0
        before = copy.deepcopy(weights)
        _take_step(optimizer, weights)
        moved = any(not a.equal(b) for a, b in zip(weights, before, strict=True))
        assert not moved, "weights move at a rate of zero"


def _step(provider: Any) -> None:
    weights = _weights()
    optimizer, before = _optimizer(provider, weights), _loss(weights).item()
    _take_step(optimizer, weights)
    after = _loss(weights).item()
    assert after < before, f"a step changes a quadratic loss from {before:.6g} to {after:.6g}"


def _no_gradient(provider: Any) -> None:
    """Without a gradient a weight stays as it is, decay or not, and learns once it has one. Its
    state can be dropped, if none was made beforehand, and is made anew."""
    weights = _weights()
    optimizer = _optimizer(provider, weights)
    makes_states = not optimizer.state
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1
    frozen, before = weights[0].requires_grad_(False), weights[0].clone()
    for _ in range(2):
        _take_step(optimizer, weights)
    assert frozen.equal(before), "a weight that has no gradient moves"
    frozen.requires_grad_(True)
    _take_step(optimizer, weights)
    assert not frozen.equal(before), "a weight that has a gradient for the first time stays"
    if makes_states:
        optimizer.state.pop(frozen, None)
        frozen.requires_grad_(False)
        _take_step(optimizer, weights)
        assert not optimizer.state.get(frozen), "a weight without a gradient gets a state"
        frozen.requires_grad_(True)
        before = frozen.detach().clone()
        _take_step(optimizer, weights)
        assert not frozen.equal(before), "a weight whose state was dropped stays"


def _state_dict(provider: Any) -> None:
    """An optimizer that loaded the state of another takes the same steps, to the bit."""
    weights = _weights()
    optimizer = _optimizer(provider, weights)
    for _ in range(3):
        _take_step(optimizer, weights)
    others = copy.deepcopy(weights)
    resumed = _optimizer(provider, others)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        _take_step(optimizer, weights)
        _take_step(resumed, others)
    same = all(a.equal(b) for a, b in zip(weights, others, strict=True))
    assert same, "after loading its state, the next steps differ"
