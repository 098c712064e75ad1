"""The sides of ``gpu.py``: runs of APT's trainer and of a bare loop, timed in turns."""

from __future__ import annotations

import gc
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from _apt_turns import patched_fetches, trainer_loop
from _bare import NanoGPT, Recipe, nanogpt_section, random_windows, train
from _harness import Timings
from _turns import Loop, take_turns
from apt_core.parallel.peak import measured_peak_flops
from apt_core.plugin_manager import PluginManager
from apt_core.training import Trainer
from apt_core.training.run import Run

Profile = Mapping[str, Any]
Maker = Callable[["Bench", "Shape"], Loop[nn.Module]]
WARMUP = 2
"""Rounds that are not counted; the first compiles a model that is to be compiled."""

NOMINAL_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
}
"""FLOP/s of dense bf16 products by part of a GPU's name, from NVIDIA's data sheets of the H100,
H200 and A100, whose figures with sparsity are twice as high."""


@dataclass(frozen=True)
class Shape:
    """A model with nanoGPT's parts and its batches; a turn is ``turn`` steps."""

    num_layers: int
    num_heads: int
    d_model: int
    vocab_size: int
    batch_size: int
    length: int
    turn: int

    @property
    def tokens(self) -> int:
        return self.batch_size * self.length

    def model(self) -> dict[str, Any]:
        parts = nanogpt_section(self.num_layers, self.num_heads, self.d_model, self.length)
        return {**parts, "vocab_size": self.vocab_size}

    def __str__(self) -> str:
        return (
            f"{self.num_layers} x {self.d_model}, {self.vocab_size:,} ids, "
            f"batch {self.batch_size} of {self.length}"
        )


@dataclass(frozen=True)
class Bench:
    """Device, scratch folder, texts and number of rounds, the same for all sides."""

    device: torch.device
    folder: Path
    text: str
    val_text: str
    rounds: int

    @property
    def dtype(self) -> torch.dtype | None:
        """The autocast type of the forward; None for fp32."""
        return torch.bfloat16 if self.device.type == "cuda" else None

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def sized(self, shape: Shape) -> Shape:
        """``shape`` on a GPU; on a CPU one small enough for a dry run."""
        if self.device.type == "cuda":
            return shape
        return replace(
            shape,
            num_layers=min(2, shape.num_layers),
            num_heads=min(2, shape.num_heads),
            d_model=32,
            vocab_size=256 + shape.vocab_size % 256,
            batch_size=2,
            length=32,
            turn=2,
        )

    def steps(self, shape: Shape) -> int:
        return (WARMUP + self.rounds) * shape.turn + 1


@dataclass(frozen=True)
class Side:
    """One side of a row: its label in tables, and the function that makes its loop.

    ``fp32``: it computes products in fp32, not in bf16. ``nanogpt``: its model has nanoGPT's parts,
    so that :func:`flops_per_step` holds. ``shape`` replaces that of the row.
    """

    label: str
    make: Maker
    fp32: bool = False
    nanogpt: bool = True
    shape: Shape | None = None


def trainer(
    label: str,
    model: Profile | None = None,
    training: Profile | None = None,
    hardware: Profile | None = None,
    **described: Any,
) -> Side:
    """A run of APT's trainer; ``model``, ``training`` and ``hardware`` override its profile's keys.

    It computes in bf16 on a GPU, and compiles nothing unless ``training`` asks for it.
    """
    own_model, own_training = dict(model or {}), dict(training or {})

    def make(bench: Bench, shape: Shape) -> Loop[nn.Module]:
        if len(bench.text.encode()) <= bench.steps(shape) * shape.tokens:
            raise ValueError("the text is too short: an epoch would end within the timed steps")
        train_text, val_text = bench.folder / "train.txt", bench.folder / "val.txt"
        if not train_text.exists():
            train_text.write_text(bench.text, encoding="utf-8")
            val_text.write_text(bench.val_text, encoding="utf-8")
        profile = {
            "name": "gpu",
            "model": {**shape.model(), **own_model},
            "training": {
                "batch_size": shape.batch_size,
                "max_epochs": 10_000,
                "max_steps": bench.steps(shape),
                "learning_rate": 6e-4,
                "scale_lr_by_width": False,
                "mixed_precision": bool(bench.dtype),
                "compile": False,
                "save_freq": 0,
                **own_training,
            },
            "data": {"train_path": str(train_text), "val_path": str(val_text)},
            "evaluation": {"eval_freq": 0, "eval_batches": 1, "sample_tokens": 0},
            "hardware": {"device": str(bench.device), **(hardware or {})},
        }

        def made() -> Trainer:
            output = Path(tempfile.mkdtemp(dir=bench.folder))
            return Trainer(profile, PluginManager(), output=output)

        return trainer_loop(made)

    return Side(label, make, **described)


def bare(label: str, *, compiled: bool = False, shape: Shape | None = None) -> Side:
    """A run of nanoGPT's model and loop in plain PyTorch."""

    def make(bench: Bench, shape: Shape) -> Loop[nn.Module]:
        return partial(_bare, bench, shape, compiled)

    return Side(label, make, shape=shape)


def _bare(bench: Bench, shape: Shape, compiled: bool, fetched: Callable[[], None]) -> nn.Module:
    model = NanoGPT(
        vocab_size=shape.vocab_size,
        length=shape.length,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        d_model=shape.d_model,
    ).to(bench.device)
    # nanoGPT compiles the loss too, which its forward includes.
    loss_of: Any = torch.compile(model.loss) if compiled else model.loss
    generator = torch.Generator().manual_seed(0)
    tokens = torch.frombuffer(bytearray(bench.text.encode()), dtype=torch.uint8).long()

    def batch() -> tuple[Tensor, Tensor]:
        fetched()
        pair = random_windows(tokens, shape.batch_size, shape.length, generator)
        if bench.device.type == "cpu":
            return pair
        inputs, targets = (part.pin_memory() for part in pair)
        return inputs.to(bench.device, non_blocking=True), targets.to(
            bench.device, non_blocking=True
        )

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with bench.autocast():
            return loss_of(inputs, targets)

    recipe = Recipe(
        steps=bench.steps(shape),
        batch_size=shape.batch_size,
        length=shape.length,
        learning_rate=6e-4,
        warmup_steps=10,
    )
    train(model, loss, batch, recipe)
    return model


def waiting(loop: Loop[nn.Module], bench: Bench, turn: int) -> Loop[nn.Module]:
    """``loop`` with a wait for the GPU where a turn begins and ends."""

    def run(fetched: Callable[[], None]) -> nn.Module:
        fetches = 0

        def wait_and_fetch() -> None:
            nonlocal fetches
            if fetches % turn == 0:
                bench.synchronize()
            fetches += 1
            fetched()

        return loop(wait_and_fetch)

    return run


@contextmanager
def steps_alone() -> Iterator[None]:
    """Make trainers end after their last step, without the checkpoint, evaluation and sample, which
    would take most of a row's time."""
    with (
        patched_fetches(),
        patch.object(Run, "_finish", lambda run: None),
        patch.object(Run, "_save_after_failure", lambda run, error: None),
    ):
        yield


def timed(bench: Bench, shape: Shape, sides: Mapping[str, Side]) -> Timings:
    """Wall-clock nanoseconds per step of each side, in turns; the first is the baseline."""
    loops = {}
    for name, side in sides.items():
        own = bench.sized(side.shape or shape)
        loops[name] = waiting(side.make(bench, own), bench, own.turn)
    with steps_alone():
        return take_turns(
            loops,
            baseline=next(iter(sides)),
            rounds=bench.rounds,
            warmup=WARMUP,
            steps=bench.sized(shape).turn,
        ).wall


LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
"""First words of the CUDA runtime's and driver's calls that start work on the device."""


def measure_memory_and_launches(bench: Bench, shape: Shape, side: Side) -> dict[str, float]:
    """Memory and launches of one step of ``side`` in a run of its own; empty on a CPU.

    ``gib`` is the peak memory of tensors, ``launches`` counts the host's calls that start work,
    ``kernels`` what the device ran. A CUDA graph is one launch of many kernels.
    """
    if bench.device.type == "cpu":
        return {}
    shape, bench = replace(shape, turn=1), replace(bench, rounds=4)
    gc.collect()  # frees the timed sides
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(bench.device)
    held = torch.cuda.memory_allocated(bench.device)
    fetches, profiler, profiled = 0, torch.profiler.profile(), bench.steps(shape) - 1

    def fetched() -> None:
        nonlocal fetches
        fetches += 1
        if fetches in (profiled, profiled + 1):
            bench.synchronize()
            (profiler.start if fetches == profiled else profiler.stop)()

    with steps_alone():
        side.make(bench, shape)(fetched)
    gib = (torch.cuda.max_memory_allocated(bench.device) - held) / 2**30
    on_device = torch.autograd.DeviceType.CUDA
    events = [event for event in profiler.events() or () if not event.is_user_annotation]
    return {
        "gib": gib,
        "launches": sum(event.name.startswith(LAUNCHES) for event in events),
        "kernels": sum(event.device_type == on_device for event in events),
    }


def flops_per_step(shape: Shape) -> float:
    """Floating-point operations of a forward and backward: 6 per token for each parameter of a
    matrix, and attention's products (PaLM, appendix B, https://arxiv.org/abs/2204.02311)."""
    width, layers = shape.d_model, shape.num_layers
    matrices = 12 * layers * width**2 + shape.vocab_size * width
    return shape.tokens * (6 * matrices + 12 * layers * width * shape.length)


def nominal_peak(bench: Bench) -> float | None:
    """The data sheet's FLOP/s in bf16; None for a CPU or a GPU that is not in the table."""
    if bench.device.type == "cpu":
        return None
    name = torch.cuda.get_device_name(bench.device)
    known = (peak for part, peak in NOMINAL_PEAKS.items() if re.search(rf"\b{part}\b", name))
    return next(known, None)


def describe_side(
    bench: Bench, shape: Shape, name: str, side: Side, seconds: float
) -> dict[str, Any]:
    """The figures of a side: its pace, its share of the peak, memory and launches."""
    shape = bench.sized(side.shape or shape)
    found: dict[str, Any] = {
        "side": name,
        "label": side.label,
        "shape": str(shape),
        "step_ms": 1e3 * seconds,
        "tokens_per_second": shape.tokens / seconds,
        **measure_memory_and_launches(bench, shape, side),
    }
    if side.nanogpt:
        used = flops_per_step(shape) / seconds
        dtype = torch.float32 if side.fp32 or bench.dtype is None else bench.dtype
        found["share_of_measured_peak"] = used / measured_peak_flops(bench.device, dtype)
        peak = nominal_peak(bench)
        if peak is not None and dtype == torch.bfloat16:
            found["share_of_nominal_peak"] = used / peak
    return found
