"""What a step reads of its tensors, on the branches that a GPU takes."""

from __future__ import annotations

from typing import Any

import pytest
from torch.overrides import TorchFunctionMode

from apt_core import hookimpl
from apt_core.testing import tiny_run
from apt_core.training.step import finite_guard, gradients

LOG_EVERY = 5
READS = {
    *("item", "tolist", "numpy", "__array__", "cpu", "tensor", "as_tensor", "nonzero", "unique"),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__", "equal", "masked_select"),
    *("multinomial", "bincount"),
}
"""Functions that wait for a GPU."""


class Reading(TorchFunctionMode):
    """Notes what is read from the start of a step to its end, and in how many steps it looked."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.steps = False, 0
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if self.on and getattr(function, "__name__", "") in READS:
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))

    @hookimpl(priority=0)
    def on_step_start(self, step: int) -> None:
        self.on = step % LOG_EVERY != 0
        self.steps += self.on

    @hookimpl(priority=100)
    def on_step_end(self) -> None:
        self.on = False


class Never:
    """An attribute that is False, whatever is written to it."""

    def __get__(self, instance: Any, owner: Any) -> bool:
        return False

    def __set__(self, instance: Any, value: bool) -> None:
        pass


MOE, ROUTING = "apt_plugins.moe.plugin", "apt_plugins.routing.plugin"
EXPERTS = {"model.moe.experts": 4, "model.moe.top_k": 2}
LIMITED = {
    "model.moe.dropless": False,
    "model.moe.capacity": 0.8,
    "routing.exploration": 1.0,
    "routing.balancing": "bias",
}


@pytest.mark.parametrize(
    ("plugins", "settings"),
    [
        ((), {"training.ema_decay": 0.9, "training.mixed_precision": True}),
        ((), {"training.optimizer_name": "muon", "model.dropout": 0.1}),
        ((MOE, ROUTING), EXPERTS | LIMITED),
        (("apt_plugins.align.plugin",), {"model.tva.s": 1}),
    ],
    ids=["adamw", "muon", "experts", "align"],
)
def test_nothing_is_read_between_log_steps(plugins, settings, monkeypatch):
    monkeypatch.setattr(finite_guard, "decides_on_device", lambda optimizer, device: True)
    monkeypatch.setattr(gradients.Gradients, "_reads", Never(), raising=False)
    overrides = {
        "training.log_every_steps": LOG_EVERY,
        "training.grad_accum_steps": 2,
        "evaluation.eval_freq": LOG_EVERY,
        "evaluation.sample_tokens": 0,
        **settings,
    }
    with Reading() as reading:
        tiny_run(*plugins, reading, steps=9, overrides=overrides)
    assert (reading.steps, reading.found) == (8, [])
