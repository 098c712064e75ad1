"""What training costs on a GPU: APT against a bare loop like nanoGPT's, part by part.

On a machine without a GPU every row is measured at a small size on the CPU: that shows that the
benchmark works, and its figures mean nothing else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _apt_turns import handing_over, trainer_loop
from _bare import NanoGPT, Recipe, nanogpt_section, random_windows, train
from _harness import Report, Timings, interleave, run
from _turns import Loop, take_turns
from apt_core.inference.generator import generate
from apt_core.kernel import boot
from apt_core.modeling import ModelBuilder
from apt_core.modeling.layers import SwiGLU
from apt_core.plugin_manager import PluginManager
from apt_core.registry import Registry
from apt_core.training import Trainer
from apt_core.training.peak import measured_peak_flops
from apt_core.types import GenerationRequest
from apt_plugins.moe.experts import Experts
from apt_plugins.moe.layer import MoELayer
from apt_plugins.moe.router import TopKRouter

Profile = Mapping[str, Any]
Maker = Callable[["Bench", "Shape"], Loop[nn.Module]]
WARMUP = 2
"""Rounds that are not counted; a compiled model is compiled in the first."""


@dataclass(frozen=True)
class Shape:
    """A model like nanoGPT's and its batches; ``turn`` steps are timed at a time."""

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


GPT2 = Shape(12, 12, 768, 50304, batch_size=12, length=1024, turn=5)
SMALL = Shape(4, 4, 128, 256, batch_size=16, length=256, turn=20)
ONE_LAYER = Shape(1, 1, 32, 256, batch_size=2, length=32, turn=20)
EXPERTS, TOP_K = (8, 32, 64), 2


@dataclass(frozen=True)
class Bench:
    """Where it runs, how large, and the text that all train on."""

    device: torch.device
    folder: Path
    text: str
    val_text: str
    rounds: int

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the forward; None where it is fp32."""
        return torch.bfloat16 if self.device.type == "cuda" else None

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def sized(self, shape: Shape) -> Shape:
        """``shape``, or what a CPU can do in a second."""
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
    """A trainer's run: how it is called in tables, and its profile beyond the shape's."""

    label: str
    model: Profile = field(default_factory=dict)
    training: Profile = field(default_factory=dict)

    def profile(self, bench: Bench, shape: Shape) -> dict[str, Any]:
        train_text, val_text = bench.folder / "train.txt", bench.folder / "val.txt"
        if not train_text.exists():
            train_text.write_text(bench.text, encoding="utf-8")
            val_text.write_text(bench.val_text, encoding="utf-8")
        return {
            "name": "gpu",
            "model": {**shape.model(), **self.model},
            "training": {
                "batch_size": shape.batch_size,
                "max_epochs": 10_000,
                "max_steps": bench.steps(shape),
                "learning_rate": 6e-4,
                "scale_lr_by_width": False,
                "mixed_precision": "auto" if bench.dtype else False,
                "save_freq": 0,
                **self.training,
            },
            "data": {"train_path": str(train_text), "val_path": str(val_text)},
            "evaluation": {"eval_freq": 0, "eval_batches": 1, "sample_tokens": 0},
            "hardware": {"device": str(bench.device)},
        }

    def loop(self, bench: Bench, shape: Shape) -> Loop[nn.Module]:
        profile = self.profile(bench, shape)

        def make() -> Trainer:
            return Trainer(
                profile, PluginManager(), output=Path(tempfile.mkdtemp(dir=bench.folder))
            )

        return trainer_loop(make)


def bare(bench: Bench, shape: Shape, *, compiled: bool = False) -> Loop[nn.Module]:
    """nanoGPT's model, precision and loop."""

    def loop(fetched: Callable[[], None]) -> nn.Module:
        model = NanoGPT(
            vocab_size=shape.vocab_size,
            length=shape.length,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            d_model=shape.d_model,
        ).to(bench.device)
        called: Any = torch.compile(model) if compiled else model
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
                logits = called(inputs)
                return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

        recipe = Recipe(
            steps=bench.steps(shape),
            batch_size=shape.batch_size,
            length=shape.length,
            learning_rate=6e-4,
            warmup_steps=10,
        )
        train(model, loss, batch, recipe)
        return model

    return loop


def waiting(loop: Loop[nn.Module], bench: Bench, turn: int) -> Loop[nn.Module]:
    """``loop``, which waits for the GPU where a turn begins and ends, and nowhere else."""

    def run_(fetched: Callable[[], None]) -> nn.Module:
        fetches = 0

        def told() -> None:
            nonlocal fetches
            if fetches % turn == 0:
                bench.synchronize()
            fetches += 1
            fetched()

        return loop(told)

    return run_


def timed(bench: Bench, shape: Shape, makers: Mapping[str, Maker], over: str) -> Timings:
    with handing_over():
        return take_turns(
            {name: waiting(make(bench, shape), bench, shape.turn) for name, make in makers.items()},
            baseline=over,
            rounds=bench.rounds,
            warmup=WARMUP,
            steps=shape.turn,
        ).wall


@dataclass
class Alone:
    """What one step takes besides time, measured with nothing beside it."""

    gib: float = 0.0
    launches: int = 0


def alone(bench: Bench, shape: Shape, make: Maker) -> Alone:
    """Peak memory of a few steps, and the kernels that one of them launches; zeros on a CPU."""
    found = Alone()
    if bench.device.type == "cpu":
        return found
    shape, bench = replace(shape, turn=1), replace(bench, rounds=3)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(bench.device)
    fetches, profiler = 0, torch.profiler.profile()

    def fetched() -> None:
        nonlocal fetches
        fetches += 1
        if fetches in (4, 5):
            bench.synchronize()
            (profiler.start if fetches == 4 else profiler.stop)()

    with handing_over():
        make(bench, shape)(fetched)
    found.gib = torch.cuda.max_memory_allocated(bench.device) / 2**30
    found.launches = sum(
        event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events() or ()
    )
    return found


def flops_per_step(shape: Shape) -> float:
    """Of a forward and backward: 6 for each parameter of a matrix, and the attention's products
    (the appendix of PaLM, https://arxiv.org/abs/2204.02311)."""
    width, layers = shape.d_model, shape.num_layers
    matrices = 12 * layers * width**2 + shape.vocab_size * width
    return shape.tokens * (6 * matrices + 12 * layers * width * shape.length)


MHA = Side("APT")
TRAINERS = {
    "apt": MHA,
    "apt_compiled": Side("APT, compiled", training={"compile": True}),
    "apt_muon": Side("APT, Muon", training={"optimizer_name": "muon"}),
}
ATTENTIONS = {
    "mha": MHA,
    "gqa": Side("grouped queries", {"num_kv_heads": 1}),
    "tva": Side("TVA", {"attention_name": "tva_default"}),
    "flash_v2": Side("TVA on flash-attention", {"attention_name": "flash_v2"}),
}


def measure_trainers(report: Report, bench: Bench) -> None:
    shape = bench.sized(GPT2)
    odd = shape.vocab_size - 47
    named: dict[str, tuple[str, Maker]] = {
        "bare": ("bare loop", bare),
        "bare_compiled": ("bare loop, compiled", partial(bare, compiled=True)),
        **{name: (side.label, side.loop) for name, side in TRAINERS.items()},
        "apt_odd_vocabulary": (f"APT, {odd:,} ids", Side("", {"vocab_size": odd}).loop),
    }
    if bench.device.type == "cpu":  # a compiler may be missing, and takes a minute
        named = {name: side for name, side in named.items() if not name.endswith("compiled")}
    times = timed(bench, shape, {name: make for name, (_, make) in named.items()}, "bare")
    for name in named:
        if name != "bare":
            report.ratio(f"{name}_over_bare", times, name, over="bare")
    report.noise("bare_over_bare", times)
    peak = measured_peak_flops(bench.device, bench.dtype or torch.float32)
    rows: list[list[str | float]] = []
    for name, (label, make) in named.items():
        seconds = times.median(name) / 1e9
        taken = alone(bench, shape, make)
        share = flops_per_step(shape) / seconds / peak
        row = [seconds * 1e3, shape.tokens / seconds, share, taken.gib, taken.launches]
        rows.append([label, *row])
        if name in ("bare", "apt"):
            report.add(f"{name}_tokens_per_second", round(shape.tokens / seconds))
            report.add(f"{name}_share_of_peak", share)
    report.table(
        f"{shape.num_layers} x {shape.d_model}, batch {shape.batch_size} of {shape.length}",
        ["trainer", "ms a step", "tokens/s", "share of the measured peak", "GiB", "launches"],
        rows,
    )


def measure_attentions(report: Report, bench: Bench) -> None:
    shape = bench.sized(GPT2)
    sides = {name: side for name, side in ATTENTIONS.items() if usable(side)}
    times = timed(bench, shape, {name: side.loop for name, side in sides.items()}, "mha")
    for name in sides:
        if name != "mha":
            report.ratio(f"{name}_over_mha", times, name, over="mha")
    if missing := [side.label for name, side in ATTENTIONS.items() if name not in sides]:
        report.note(f"Not usable here: {', '.join(missing)}.")


def usable(side: Side) -> bool:
    name = side.model.get("attention_name", "mha")
    registry = boot({"name": "gpu", "model": dict(side.model)}).registry
    registry.get("attention", name)
    return registry.resolutions["attention", name].used == name


def measure_saving(report: Report, bench: Bench) -> None:
    shape = bench.sized(GPT2)
    saving = Side("saving", training={"save_every_steps": 2 * shape.turn, "keep_last": 1})
    times = timed(bench, shape, {"silent": MHA.loop, "saving": saving.loop}, "silent")
    report.ratio("saving_over_silent", times, "saving", over="silent")


def measure_small(report: Report, bench: Bench) -> None:
    """Where launches are what costs: the defaults' size, and a single layer."""
    for name, full in (("small", SMALL), ("one_layer", ONE_LAYER)):
        makers: dict[str, Maker] = {"bare": bare, "apt": MHA.loop}
        if bench.device.type == "cuda":
            makers["apt_compiled"] = TRAINERS["apt_compiled"].loop
        times = timed(bench, bench.sized(full), makers, "bare")
        for side in makers:
            if side != "bare":
                report.ratio(f"{side}_over_bare_{name}", times, side, over="bare")


def measure_experts(report: Report, bench: Bench) -> None:
    """A layer of experts over the dense one of as many operations, forward and backward."""
    cuda = bench.device.type == "cuda"
    tokens, width, hidden = (12 * 1024, 768, 1536) if cuda else (64, 32, 64)

    def backward(layer: nn.Module) -> Callable[[], None]:
        layer.to(bench.device)
        x = torch.randn(1, tokens, width, device=bench.device, requires_grad=True)
        wanted = [x, *layer.parameters()]

        def step() -> None:
            with bench.autocast():
                y = layer(x)
            torch.autograd.grad(y, wanted, torch.ones_like(y))
            bench.synchronize()

        return step

    for experts in EXPERTS if cuda else EXPERTS[:1]:
        sides = {
            "dense": backward(SwiGLU(width, TOP_K * hidden)),
            "moe": backward(
                MoELayer(
                    TopKRouter(width, experts, TOP_K),
                    Experts(experts, width, hidden),
                    top_k=TOP_K,
                )
            ),
        }
        times = interleave(sides, baseline="dense", rounds=4 * bench.rounds, calls=1)
        report.ratio(f"moe_E{experts}_over_dense", times, "moe", over="dense")


def measure_decoding(report: Report, bench: Bench) -> None:
    shape = bench.sized(GPT2)
    model = ModelBuilder({"model": shape.model()}).build_model().to(bench.device)
    tokenizer, manager = Registry().get("tokenizer", "byte"), PluginManager()
    request = GenerationRequest(prompt="The ", max_new_tokens=shape.length // 2, temperature=0.0)

    def decode() -> None:
        with bench.autocast():
            generate(
                model,
                tokenizer,
                request,
                manager,
                max_seq_len=shape.length,
                device=bench.device,
            )
        bench.synchronize()

    times = interleave({"decode": decode}, baseline="decode", rounds=3, calls=1, warmup=1)
    seconds = times.median("decode") / 1e9
    report.add("decoded_tokens_per_second", round(request.max_new_tokens / seconds, 1))


PARTS: Sequence[Callable[[Report, Bench], None]] = (
    measure_trainers,
    measure_attentions,
    measure_saving,
    measure_small,
    measure_experts,
    measure_decoding,
)


@contextmanager
def benched(quick: bool) -> Iterator[Bench]:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    text = Registry().get("dataset", "pydoc").load()
    with tempfile.TemporaryDirectory() as folder:
        yield Bench(
            torch.device("cuda", 0) if cuda else torch.device("cpu"),
            Path(folder),
            text.train,
            text.val,
            rounds=(4 if quick else 10) if cuda else 1,
        )


def measure(report: Report, quick: bool) -> None:
    with benched(quick) as bench:
        if bench.device.type == "cuda":
            report.machine["gpu"] = torch.cuda.get_device_name(bench.device)
            report.versions["cuda"] = str(torch.version.cuda)
        else:
            report.note("No GPU: sizes are tiny, and the figures only show that every row runs.")
        for part in PARTS:
            part(report, bench)


if __name__ == "__main__":
    run("What does training cost on a GPU?", measure, packages=["torch"])
