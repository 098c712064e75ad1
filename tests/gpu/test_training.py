"""Runs on a GPU: what they compute, what they wait for, and what they leave behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_core import hookimpl
from apt_core.cli.run_command import run_command
from apt_core.cli.train import app
from apt_core.testing import TinyRun, tiny_run
from apt_plugins.moe.device_experts import GROUPED_MAJORS

pytestmark = pytest.mark.gpu

GPU = "cuda"
LOG_EVERY = 5
STEPS = 20


def ran(*plugins: Any, device: str = GPU, steps: int = STEPS, **options: Any) -> TinyRun:
    overrides = {
        "hardware.device": device,
        "training.log_every_steps": LOG_EVERY,
        "evaluation.eval_freq": LOG_EVERY,
        **options.pop("overrides", {}),
    }
    return tiny_run(*plugins, steps=steps, overrides=overrides, **options)


def losses(run: TinyRun) -> list[float]:
    return [row["loss"] for row in run.metrics if "loss" in row]


class WithoutWaiting:
    """Every wait of the host for the device is an error, but in log steps and evaluations."""

    def __init__(self) -> None:
        self.steps = 0

    @hookimpl
    def on_step_start(self, step: int) -> None:
        quiet = step % LOG_EVERY
        self.steps += bool(quiet)
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")

    @hookimpl
    def on_step_end(self, step: int) -> None:
        if step % LOG_EVERY == LOG_EVERY - 1:
            torch.cuda.set_sync_debug_mode("default")

    @hookimpl
    def on_evaluation_start(self) -> None:
        torch.cuda.set_sync_debug_mode("default")

    @hookimpl
    def on_training_end(self) -> None:
        torch.cuda.set_sync_debug_mode("default")


MOE, ROUTING = "apt_plugins.moe.plugin", "apt_plugins.routing.plugin"
EXPERTS = {"model.moe.experts": 4, "model.moe.top_k": 2}
LIMITED = {
    **EXPERTS,
    "model.moe.dropless": False,
    "model.moe.capacity": 0.8,
    "routing.exploration": 1.0,
    "routing.balancing": "bias",
}


@pytest.mark.parametrize("device", [GPU, f"{GPU}:0"])
@pytest.mark.parametrize(
    ("plugins", "settings"),
    [
        ((), {"training.optimizer_name": "adamw", "training.ema_decay": 0.9}),
        ((), {"training.optimizer_name": "muon"}),
        ((MOE,), EXPERTS),
        ((MOE, ROUTING), LIMITED),
        (("apt_plugins.align.plugin",), {"model.tva.s": 1}),
    ],
    ids=["adamw", "muon", "experts", "experts with a limit", "align"],
)
def test_nothing_waits_between_log_steps(
    device: str, plugins: tuple[str, ...], settings: dict[str, Any]
) -> None:
    """With two micro-batches, and padding at the end of an epoch."""
    if settings is EXPERTS and torch.cuda.get_device_capability()[0] not in GROUPED_MAJORS:
        pytest.skip("experts without a limit take turns here, by numbers that the host reads")
    watching = WithoutWaiting()
    try:
        overrides = {
            "training.mixed_precision": "auto",
            "training.grad_accum_steps": 2,
            "training.max_epochs": 4,
            **settings,
        }
        run = ran(*plugins, watching, device=device, overrides=overrides)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watching.steps == STEPS - STEPS // LOG_EVERY
    assert run.manifest["device"] == "cuda:0"


@pytest.mark.parametrize(("precision", "tolerance"), [(False, 1e-4), (True, 2e-2)])
def test_losses_are_those_of_the_cpu(precision: bool, tolerance: float) -> None:
    overrides = {"training.mixed_precision": precision, "hardware.tf32": False}
    expected = losses(ran(device="cpu"))
    assert losses(ran(overrides=overrides)) == pytest.approx(expected, rel=tolerance)


class NotANumber:
    """Makes the loss of the third step no number."""

    @hookimpl
    def apt_loss_terms(self, trainer: Any, output: Any) -> dict[str, torch.Tensor]:
        factor = float("nan") if trainer.step == 2 else 0.0
        return {"term": factor * output.logits.float().mean()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_no_number_changes_nothing(optimizer: str) -> None:
    overrides = {"training.optimizer_name": optimizer}
    run = ran(NotANumber(), overrides=overrides)
    alone = ran(overrides=overrides)
    assert all(torch.isfinite(value).all() for value in run.weights.values())
    assert losses(run) != losses(alone)
    assert run.manifest["figures"]["skipped_steps"] == 1


def test_deterministic_runs_have_the_same_bits() -> None:
    overrides = {"training.deterministic": True, "training.mixed_precision": True}
    one, other = (ran(overrides=overrides) for _ in range(2))
    assert one.same_weights(other) and losses(one) == losses(other)


def test_the_memory_of_a_run_is_that_of_its_tensors() -> None:
    """Of the measurement of the peak before it, and of other runs, there would be more."""
    large = ran(steps=1, overrides={"model.vocab_size": 2**16, "model.d_model": 512})
    small = ran(steps=1)
    assert 0 < small.manifest["figures"]["memory_mb"] < 64 < large.manifest["figures"]["memory_mb"]


def test_a_checkpoint_goes_to_the_cpu_and_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for device, step in ((GPU, 4), ("cpu", 8), (GPU, 12)):
        run = ran(device=device, output=folder, stop_at_step=step, resume=step > 4)
        assert run.manifest["figures"]["steps"] == step


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_resumes_with_the_same_bits(
    optimizer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["-p", "tiny_debug", "--verify-resume", "--stop-at-step", "8"]
    words += ["--hardware.device", GPU, "--training.optimizer_name", optimizer]
    words += ["--model.dropout", "0.1", "--training.mixed_precision", "true"]
    code = run_command(app, "apt-train", words)
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    assert "bit-equal: " in printed.out


FORKS = """
import multiprocessing, sys, torch
from apt_core.modeling import ModelBuilder
from apt_core.testing import TINY_PROFILE

ModelBuilder({"model": TINY_PROFILE["model"]}).build_model()
child = multiprocessing.get_context("fork").Process(target=torch.zeros, args=(1,),
                                                    kwargs={"device": sys.argv[1]})
child.start()
child.join()
sys.exit(child.exitcode)
"""


def test_a_child_forked_after_a_build_on_the_cpu_can_use_the_gpu() -> None:
    subprocess.run([sys.executable, "-c", FORKS, GPU], check=True)
