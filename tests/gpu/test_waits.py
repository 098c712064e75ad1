"""How often the host waits for a GPU, by torch's own warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from apt_core import GenerationRequest, hookimpl
from apt_core.inference import generate
from apt_core.modeling import ModelBuilder
from apt_core.plugin_manager import PluginManager
from apt_core.registry import Registry
from apt_core.testing import TINY_PROFILE, tiny_run
from apt_core.training.host_copies import HostCopies

pytestmark = pytest.mark.gpu

GPU = "cuda"
LOG_EVERY = 5


@contextmanager
def waits() -> Iterator[list[Any]]:
    """The warnings of what waits inside."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield (found := [])
        finally:
            torch.cuda.set_sync_debug_mode(before)
            found += [warning for warning in told if "synchroniz" in str(warning.message)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_generated_token_waits_once(temperature: float, dtype: torch.dtype | None) -> None:
    model = ModelBuilder({"model": {**TINY_PROFILE["model"], "max_seq_len": 64}}).build_model()
    model.to(GPU)
    numbers = []
    for tokens in (1, 10, 30):  # the first for what is only set up once
        request = GenerationRequest("The ", max_new_tokens=tokens, temperature=temperature)
        with waits() as found:
            result = generate(
                model,
                Registry().get("tokenizer", "byte"),
                request,
                PluginManager(),
                max_seq_len=64,
                device=torch.device(GPU, 0),
                dtype=dtype,
            )
        assert len(result.tokens) == tokens
        numbers.append(len(found))
    assert numbers[2] - numbers[1] == 20


def test_copies_for_a_checkpoint_wait_once() -> None:
    tensors = {str(size): torch.randn(size, 3, device=GPU) for size in range(40)}
    given = {"model": tensors, "optimizer": {"step": torch.tensor(3.0, device=GPU)}}
    copies = HostCopies()
    for _ in range(2):
        with waits() as found:
            made = copies.of(given)
        assert len(found) <= 1
        for group, expected in given.items():
            for name, tensor in expected.items():
                assert torch.equal(made[group][name], tensor.cpu())
                assert made[group][name].is_pinned() or not tensor.numel()


class WithoutWaiting:
    """Between log steps every wait of the host for the device is an error."""

    def __init__(self) -> None:
        self.steps = 0

    @hookimpl
    def on_step_start(self, step: int) -> None:
        quiet = step % LOG_EVERY
        self.steps += bool(quiet)
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")

    @hookimpl
    def on_step_end(self) -> None:
        torch.cuda.set_sync_debug_mode("default")


MOE = "apt_plugins.moe.plugin"
EXPERTS = {"model.moe.experts": 4, "model.moe.top_k": 2, "training.mixed_precision": True}
PLUGINS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "experts": ((MOE,), EXPERTS),
    "experts with a limit": (
        (MOE, "apt_plugins.routing.plugin"),
        {
            **EXPERTS,
            "model.moe.dropless": False,
            "model.moe.capacity": 0.8,
            "routing.exploration": 1.0,
            "routing.balancing": "bias",
        },
    ),
    "alignment": (("apt_plugins.align.plugin",), {"model.tva.s": 1}),
}


@pytest.mark.parametrize("name", PLUGINS)
def test_shipped_plugins_wait_for_nothing_between_log_steps(name: str) -> None:
    """With several micro-batches, and padding in the last one of an epoch."""
    plugins, settings = PLUGINS[name]
    if MOE in plugins and torch.cuda.get_device_capability()[0] not in (9, 10):
        settings = {**settings, "model.moe.dropless": False, "model.moe.capacity": 0.8}
    overrides = {
        "hardware.device": GPU,
        "training.grad_accum_steps": 2,
        "training.ema_decay": 0.9,
        "training.log_every_steps": LOG_EVERY,
        "evaluation.eval_freq": LOG_EVERY,
        **settings,
    }
    watching = WithoutWaiting()
    try:
        tiny_run(*plugins, watching, steps=9, overrides=overrides)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watching.steps == 8
