"""What is compiled on a GPU: the same losses, no graph that is made again, no wait; and products in
TF32 but for what is compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from apt_core import hookimpl
from apt_core.data.packing.rows import IGNORED
from apt_core.modeling import ModelTransform, cross_entropy
from apt_core.testing import TinyRun, tiny_run

pytestmark = pytest.mark.gpu

GPU = "cuda"
EPOCH = 10
"""Steps: the last one has fewer windows than the others, and one of them is shorter."""

OVERRIDES = {
    "hardware.device": GPU,
    "hardware.tf32": False,
    "training.batch_size": 5,
    "training.log_every_steps": 1,
    "training.max_epochs": 3,
    "evaluation.eval_freq": 4,
    "model.dropout": 0.2,
}


class Counts:
    """How many graphs there are after each step."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    @hookimpl
    def on_step_end(self) -> None:
        self.graphs.append(counters["stats"]["unique_graphs"])


def ran(*plugins: Any, steps: int = 2 * EPOCH, **overrides: Any) -> TinyRun:
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    return tiny_run(*plugins, steps=steps, overrides={**OVERRIDES, **settings})


def losses(run: TinyRun) -> list[float]:
    return [row[name] for row in run.metrics for name in ("loss", "val_loss") if name in row]


@pytest.fixture(autouse=True)
def compiling_anew() -> Iterator[None]:
    """Dropout draws the numbers that it draws without the compiler."""
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(fallback_random=True):
        yield


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_run_has_the_losses_of_another(mode: str) -> None:
    plain = ran()
    counting = Counts()
    run = ran(counting, training__compile=True, training__compile_mode=mode)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-4)
    # All shapes of batches are there in the first epoch and the evaluation after it.
    assert len(set(counting.graphs[EPOCH:])) == 1


@pytest.mark.parametrize("state", ["ema", "rdrop"])
def test_a_second_forward_does_not_overwrite_the_first(state: str) -> None:
    bistate = {"mode": state, "weight": 0.3, "beta": 0.0}
    plain = ran("align", steps=4, model__bistate=bistate)
    graphs = {"training__compile": True, "training__compile_mode": "reduce-overhead"}
    run = ran("align", steps=4, model__bistate=bistate, **graphs)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-4)


def test_a_small_model_runs_in_graphs() -> None:
    run = ran(steps=4, training__compile="auto")
    assert run.manifest["computes"]["compile"] == {"mode": "reduce-overhead", "reason": ""}
    assert counters["inductor"]["cudagraph_skips"] == 0


class Quiet:
    """Once all is compiled, every wait of the host for the device is an error."""

    @hookimpl
    def on_step_start(self, step: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if step % EPOCH > 1 and step > EPOCH else "default")

    @hookimpl
    def on_step_end(self) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_waits_for_nothing(mode: str) -> None:
    quiet = {"training__log_every_steps": 5 * EPOCH, "training__mixed_precision": True}
    try:
        ran(Quiet(), training__compile=True, training__compile_mode=mode, **quiet)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Multiplies:
    """The relative error of a product of fp32 matrices, in a step and at a switch."""

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}

    def multiply(self, where: str) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        a = torch.randn(256, 256, generator=generator, device="cpu").to(GPU)
        exact = a.double() @ a.double()
        self.errors[where] = float((a @ a - exact).norm() / exact.norm())

    @hookimpl
    def on_step_start(self) -> None:
        self.multiply("step")

    @hookimpl
    def apt_transform_model(self, model: Any) -> ModelTransform:
        self.multiply("switch")
        return ModelTransform(model, {}, tolerance=1e-6)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="this GPU has no TF32",
)
def test_tf32_is_of_steps_and_not_of_switches() -> None:
    multiplying = Multiplies()
    ran(multiplying, steps=2, hardware__tf32=True)
    assert multiplying.errors["switch"] < 2e-6 < 1e-4 < multiplying.errors["step"]
    exact = Multiplies()
    ran(exact, steps=2)
    assert max(exact.errors.values()) < 2e-6


def test_the_loss_in_parts_is_the_loss_and_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cross_entropy, "PART_BYTES", 2**20)
    logits = torch.randn(1000, 3000, device=GPU).bfloat16().requires_grad_()
    targets = torch.randint(3000, (1000,), device=GPU)
    targets[::7] = IGNORED
    F.cross_entropy(logits.float(), targets, reduction="sum").backward()
    assert logits.grad is not None
    expected, logits.grad = logits.grad.float(), None
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_entropy._InParts.apply(logits, targets).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(logits.grad.float(), expected, rtol=1e-2, atol=1e-7)
