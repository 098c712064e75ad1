"""What each attention and feed-forward is worth: held-out losses with one backbone.

The backbone is that of the profile's defaults, trained by APT on the embedded text. Every variant
is trained for as many steps as multi-head attention, and again for as many as fit into the time
that multi-head attention takes; the times of a step are measured in turns before any training.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from _harness import Report, Series, interleave, run
from apt_core.kernel import boot
from apt_core.modeling import ModelBuilder
from apt_core.modeling.layers import SelfAttention
from apt_core.training import Trainer
from apt_core.training.prepare import Built, Parts, prepare

Losses = Mapping[tuple[str, int], Sequence[float]]
"""Validation losses in nats per byte by variant and steps, one a seed."""


@dataclass(frozen=True)
class Variant:
    """A model: its label in tables, the keys of ``model`` that differ from the defaults, and the
    plugins that it needs."""

    label: str
    model: Mapping[str, Any] = field(default_factory=dict)
    plugins: Sequence[str] = ()

    def but(self, label: str, **changes: Any) -> Variant:
        return Variant(label, {**self.model, **changes}, self.plugins)

    def profile(self, steps: int, seed: int) -> dict[str, Any]:
        return {
            "name": "quality",
            "plugins": [*self.plugins],
            "model": dict(self.model),
            "training": {
                "batch_size": 4,
                "max_epochs": 100,
                "max_steps": steps,
                "seed": seed,
                "save_freq": 0,
                "mixed_precision": False,
            },
            "evaluation": {"eval_freq": 0, "eval_batches": 1, "sample_tokens": 0},
            "hardware": {"device": "cpu", "num_threads": 1},
        }

    def prepared(self) -> tuple[Parts, Built]:
        return prepare(boot(self.profile(1, 0)), torch.device("cpu"))


@dataclass(frozen=True)
class Cost:
    """The cost of a variant: its parameters after fusing the projections of attention, as an export
    does, and the bytes of one token's keys and values in fp32."""

    parameters: int
    kv_bytes: int


MHA = Variant("MHA", {"attention_name": "mha"})
DEFAULT = Variant("TVA, the default")
"""The model of a profile without keys for attention."""
PROJECTIONS = ("qkv_weight", "out_weight", "compress", "lift")
SETTINGS = boot(DEFAULT.profile(1, 0)).config.model
D_MODEL, D_FF, HEADS = SETTINGS.d_model, SETTINGS.d_ff, SETTINGS.num_heads


def tva(label: str, **settings: Any) -> Variant:
    """The default with other ``settings`` of ``model.tva``."""
    return DEFAULT.but(label, tva={**SETTINGS.tva.model_dump(), **settings})


VARIANTS = {
    "mha": MHA,
    "mha_qk_norm": MHA.but("MHA, QK-norm", mha={"qk_norm": True}),
    "gqa": MHA.but("GQA, half the cache", num_kv_heads=HEADS // 2),
    "mqa": MHA.but("MQA", num_kv_heads=1),
    "default": DEFAULT,
    "tva_without_qk_norm": tva("TVA, no QK-norm", qk_norm=False),
    "tva_r4": tva("TVA, r=4", r=4),
    "tva_s1": tva("TVA, compensator s=1", s=1),
    "vft": DEFAULT.but("TVA and VFT, r=2", ffn_name="vft", vft={"r": 2}),
    "gelu": DEFAULT.but("TVA and GELU, 3/2 d_ff", ffn_name="gelu", d_ff=3 * D_FF // 2),
    "relu2": DEFAULT.but("TVA and squared ReLU, 3/2 d_ff", ffn_name="relu2", d_ff=3 * D_FF // 2),
}


def cost(variant: Variant) -> Cost:
    kernel = boot(variant.profile(1, 0))
    model = kernel.config.model
    with torch.device("meta"):
        built = ModelBuilder(kernel.config, kernel.registry).build_model()
    parameters = sum(p.numel() for p in built.parameters())
    kv_bytes = kernel.registry.get("attention", model.attention_name).kv_cache_bytes(
        model.d_model, model.num_heads, 1, num_kv_heads=model.num_kv_heads, bytes_per_value=4
    )
    fused = parameters + sum(map(change_by_fusing, built.modules()))
    return Cost(fused, model.num_layers * kv_bytes)


def change_by_fusing(layer: nn.Module) -> int:
    """The change in parameters when the projections of an attention are fused; else 0."""
    if not isinstance(layer, SelfAttention):
        return 0
    kept = sum(projection.numel() for projection in layer.projections())
    return kept - sum(p.numel() for name, p in layer.named_parameters() if name in PROJECTIONS)


def widened(costs: Mapping[str, Cost]) -> Variant:
    """The default with a larger d_ff, by the parameters that its attention saves."""
    saved = costs["mha"].parameters - costs["default"].parameters
    d_ff = D_FF + round(saved / (3 * D_MODEL * SETTINGS.num_layers))
    return DEFAULT.but(f"TVA, the default, d_ff={d_ff}", d_ff=d_ff)


def training_step(variant: Variant) -> Callable[[], object]:
    """One whole optimizer step on one batch, as a run takes it."""
    parts, built = variant.prepared()
    (batch,) = parts.plan.step(1, 0).batches
    parameters = list(built.model.parameters())

    def call() -> None:
        built.optimizer.zero_grad(set_to_none=True)
        (built.forward(batch)[0] / batch.num_targets).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        built.optimizer.step()

    return call


def validation_loss(task: tuple[Variant, int, int]) -> float:
    """The loss on the held-out text, nats per byte, after a whole run."""
    variant, steps, seed = task
    with tempfile.TemporaryDirectory() as folder:
        result = Trainer(variant.profile(steps, seed), output=f"{folder}/run").fit()
    return result.figures["val_loss"]


def train_all(
    asked: Iterable[tuple[str, Variant, int]], seeds: int
) -> dict[tuple[str, int], list[float]]:
    """Losses by (name, steps), one per seed, from one single-threaded process per core."""
    runs = {(name, steps): variant for name, variant, steps in asked}
    tasks = [
        (variant, steps, seed) for (_, steps), variant in runs.items() for seed in range(seeds)
    ]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), initializer=one_thread) as pool:
        losses = list(pool.map(validation_loss, tasks))
    return {key: losses[i * seeds : (i + 1) * seeds] for i, key in enumerate(runs)}


def one_thread() -> None:
    torch.set_num_threads(1)


def compare(report: Report, name: str, side: Sequence[float], peer: Sequence[float]) -> None:
    """Record the mean of ``side`` minus ``peer`` over the seeds, and its range."""
    differences = [a - b for a, b in zip(side, peer, strict=True)]
    report.add(
        name,
        statistics.mean(differences),
        spread=(min(differences), max(differences)),
        samples={"side": side, "peer": peer},
    )


def mean_and_spread(losses: Sequence[float]) -> str:
    """The mean, and its distance to the farthest seed."""
    mean = statistics.mean(losses)
    return f"{mean:.4f} ± {max(abs(loss - mean) for loss in losses):.4f}"


def measure(report: Report, quick: bool) -> None:
    steps, seeds = (20, 2) if quick else (500, 3)
    one_thread()
    costs = {name: cost(variant) for name, variant in VARIANTS.items()}
    variants = {**VARIANTS, "default_wide": widened(costs)}
    costs["default_wide"] = cost(variants["default_wide"])
    times = interleave(
        {name: training_step(variant) for name, variant in variants.items()},
        baseline="mha",
        rounds=3 if quick else 25,
        calls=1 if quick else 2,
    )
    in_time = {name: round(steps * times.median("mha") / times.median(name)) for name in variants}
    losses = train_all(
        [(name, variant, n) for name, variant in variants.items() for n in (steps, in_time[name])],
        seeds,
    )
    mha = losses["mha", steps]
    for comparison, ours, peer in (
        ("mha_equal_time", losses["default", in_time["default"]], mha),
        ("mha_equal_params", losses["default_wide", steps], mha),
        ("mha_equal_steps", losses["default", steps], mha),
        ("mha_equal_kv", losses["default", steps], losses["gqa", steps]),
        ("mha_qk_norm_equal_time", losses["default", in_time["default"]],
         losses["mha_qk_norm", in_time["mha_qk_norm"]]),
        ("no_qk_norm_equal_time", losses["default", in_time["default"]],
         losses["tva_without_qk_norm", in_time["tva_without_qk_norm"]]),
    ):  # fmt: skip
        compare(report, f"val_loss_default_minus_{comparison}", ours, peer)
    assert costs["gqa"].kv_bytes == costs["default"].kv_bytes, "not the same cache"
    report.add("kv_bytes_default_over_mha", costs["default"].kv_bytes / costs["mha"].kv_bytes)
    report.ratio("step_default_over_mha", times, "default", over="mha")
    report.noise("step_mha_over_mha", times)
    report.table(
        f"Validation loss, nats per byte: mean of {seeds} seeds ± the farthest of them",
        ["model", "parameters", "KV bytes per token", "time of a step over MHA's",
         f"loss after {steps} steps", "steps in MHA's time", "loss after that time"],
        [
            [
                variant.label,
                f"{costs[name].parameters:,}",
                costs[name].kv_bytes,
                times.ratio(name, "mha").value,
                mean_and_spread(losses[name, steps]),
                in_time[name],
                mean_and_spread(losses[name, in_time[name]]),
            ]
            for name, variant in variants.items()
        ],
    )  # fmt: skip
    report.plot(
        "time",
        f"Held-out loss after the time of {steps} steps of MHA",
        x_label="KV bytes per token",
        y_label="validation loss, nats per byte",
        series=[
            point(variants[name], costs[name], losses[name, in_time[name]]) for name in PLOTTED
        ],
    )
    report.note(NOTE)


def point(variant: Variant, cost: Cost, losses: Sequence[float]) -> Series:
    mean = statistics.mean(losses)
    return Series(variant.label, [cost.kv_bytes], [mean], [min(losses)], [max(losses)])


PLOTTED = ("mha", "mha_qk_norm", "gqa", "mqa", "default", "tva_r4")
NOTE = """\
Intervals of losses are the range over the seeds, those of times 95% of bootstrap resamples. \
"Equal parameters" widens the feed-forward of TVA by what its fused projections save; "equal KV" \
compares with grouped-query attention of the same cache. This is one backbone at one small size, \
trained for one and a half passes over a third of a megabyte: a hundredth here may be nothing \
elsewhere."""


if __name__ == "__main__":
    run(
        "What are the attentions and feed-forwards worth at equal steps, time, size and cache?",
        measure,
        packages=["torch"],
    )
