"""The memory that runs on a GPU take is what their plan says, and what is advised without enough of
it fits."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_core import hookimpl
from apt_core.device import available_memory
from apt_core.errors import TrainingError
from apt_core.modeling.structure import structure_after
from apt_core.planning.footprint import Footprint
from apt_core.planning.memory import estimate, switch_memory
from apt_core.testing import TinyRun, tiny_run
from apt_core.testing.tiny import TEXT
from apt_core.training.curriculum.switching import Switching

pytestmark = pytest.mark.gpu

GPU = "cuda"
MOE = "apt_plugins.moe.plugin"
EXPERTS = {"model.moe.top_k": 2, "model.moe.experts": 8}
BATCH = 32
PROFILE: dict[str, Any] = {
    "name": "memory",
    "model": {
        "attention_name": "mha",
        "d_model": 256,
        "num_heads": 4,
        "num_layers": 3,
        "d_ff": 1024,
        "vocab_size": 8192,
        "max_seq_len": 64,
    },
    # In one micro-batch gradients would come while activations go, and a compiler saves some.
    "training": {
        "batch_size": BATCH,
        "grad_accum_steps": 2,
        "mixed_precision": True,
        "compile": False,
    },
    "evaluation": {"eval_freq": 0, "eval_batches": 1, "sample_tokens": 0},
    "hardware": {"device": GPU},
}


class Measured:
    """The most memory of the last step, and of the switch, beside what was there before the run."""

    def __init__(self) -> None:
        gc.collect()
        self._before = torch.cuda.memory_allocated()
        self.step = self.switch = 0
        self.kernel: Any = None

    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated()) - self._before

    @hookimpl
    def on_step_start(self, trainer: Any) -> None:
        self.kernel = trainer.kernel
        torch.cuda.reset_peak_memory_stats()

    @hookimpl
    def on_step_end(self) -> None:
        self.step = self.peak()

    def planned(self, *plugins: str) -> Footprint:
        """That of the model which ``plugins`` have changed."""
        return Footprint(self.kernel, structure=structure_after(self.kernel, plugins))


@pytest.fixture
def train(tmp_path: Path) -> Any:
    """``train(*plugins, settings)``: two steps."""
    text = tmp_path / "text.txt"
    text.write_text(20 * TEXT * BATCH)
    profile = {**PROFILE, "data": {"train_path": str(text)}}

    def run(*plugins: Any, **settings: Any) -> TinyRun:
        return tiny_run(*plugins, steps=2, profile=profile, overrides=settings)

    return run


@pytest.fixture
def measured(train: Any) -> Measured:
    """Of the run that comes next. What libraries take once for all is there before."""
    train(**{"model.d_model": 64, "model.num_layers": 1, "training.batch_size": 2})
    return Measured()


@pytest.mark.parametrize("precision", [False, True])
@pytest.mark.parametrize("experts", [False, True])
def test_a_run_takes_the_memory_that_is_planned(
    train: Any, measured: Measured, experts: bool, precision: bool
) -> None:
    settings = {"training.mixed_precision": precision}
    if experts:
        train(MOE, measured, **settings, **EXPERTS)
    else:
        train(measured, **settings, **{"model.dropout": 0.1})
    planned = estimate(measured.planned(*["moe"] * experts))
    assert planned.total == pytest.approx(measured.step, rel=0.1)


def test_a_compiled_run_takes_no_more_than_is_planned(train: Any, measured: Measured) -> None:
    train(measured, **{"training.compile": True})
    assert 0 < measured.step < 1.1 * estimate(measured.planned()).total


@pytest.mark.parametrize("experts", [8, 32])
def test_a_switch_to_experts_takes_the_memory_that_is_planned(
    train: Any, measured: Measured, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = Switching.switch

    def measuring(self: Switching, plugin: str) -> bool:
        torch.cuda.reset_peak_memory_stats()
        taken = switch(self, plugin)
        measured.switch = measured.peak()
        return taken

    monkeypatch.setattr(Switching, "switch", measuring)
    train(
        MOE,
        measured,
        **{**EXPERTS, "model.moe.experts": experts, "schedules.enable_moe_at_step": 2},
    )
    old, new = measured.planned(), measured.planned("moe")
    before, after = estimate(old), estimate(new)
    planned = switch_memory(old, new, before, after) - before.snapshot
    assert planned == pytest.approx(measured.switch, rel=0.1)
    assert after.total == pytest.approx(measured.step, rel=0.1)


@pytest.fixture
def limit() -> Iterator[Any]:
    """``limit(count)`` leaves so many bytes to the process beside what it has."""

    def to(count: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(GPU).total_memory
        held = torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction((held + count) / total)

    yield to
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def settings_in(advice: str) -> dict[str, int]:
    """By key, of the options that it ends with."""
    return {key: int(value) for key, value in re.findall(r"--([\w.]+) (\d+)", advice)}


def test_what_is_advised_without_memory_fits(train: Any, measured: Measured, limit: Any) -> None:
    train(measured, **{"training.batch_size": 2})
    half = estimate(measured.planned(), batch_size=BATCH // 2).total
    limit(int(1.2 * half))
    with pytest.raises(TrainingError, match=r"out of memory in step 1: about ") as caught:
        train()
    settings = settings_in(str(caught.value))
    del caught  # its frames have the run's model
    gc.collect()
    assert settings["training.batch_size"] * settings["training.grad_accum_steps"] == 2 * BATCH
    assert settings["training.batch_size"] >= BATCH // 4
    assert train(**settings).manifest["status"] == "finished"


def test_a_switch_without_memory_is_told_with_what_it_needs(
    train: Any, measured: Measured, limit: Any
) -> None:
    settings = {**EXPERTS, "model.moe.experts": 64, "schedules.enable_moe_at_step": 2}
    train(measured)
    limit(int(1.3 * estimate(measured.planned()).total))
    with pytest.raises(TrainingError, match=r"out of memory in step 2: ") as caught:
        train(MOE, **settings)
    assert "so that a smaller one alone does not help" in str(caught.value)
    assert available_memory(torch.device(GPU)) > 0
