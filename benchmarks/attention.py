"""What TVA costs at several ranks, against multi-head, grouped-query and multi-query attention.

Every side is a provider of the registry, on SDPA, with RoPE, in fp32. One process times them in
turns: a forward, a forward with its backward, and one step of decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from _harness import Report, Series, Timings, interleave, run
from apt_core.providers import AttentionProvider
from apt_core.registry import Registry

D_MODEL, HEADS, BATCH = 768, 12, 2
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
TRAINED, CACHED = 1024, 2048
"""The length and the number of cached tokens of the figures."""

REGISTRY = Registry()


@dataclass(frozen=True)
class Side:
    """One attention: a provider, its settings and its key and value heads."""

    label: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_kv_heads: int | None = None

    @cached_property
    def provider(self) -> AttentionProvider:
        provider: AttentionProvider = REGISTRY.get(
            "attention", self.name, dict(self.settings), fallback=False
        )
        return provider

    def layer(self) -> nn.Module:
        return self.provider.create_layer(
            D_MODEL,
            HEADS,
            max_seq_len=max(LENGTHS) + 1,
            position=REGISTRY.get("position", "rope"),
            num_kv_heads=self.num_kv_heads,
        )

    def kv_bytes(self, tokens: int) -> int:
        """The provider's figure for the cache of one sequence in fp32."""
        return self.provider.kv_cache_bytes(
            D_MODEL, HEADS, tokens, num_kv_heads=self.num_kv_heads, bytes_per_value=4
        )

    def flops(self, tokens: int) -> int:
        return self.provider.flops(D_MODEL, HEADS, tokens, num_kv_heads=self.num_kv_heads)


SIDES = {
    "mha": Side("MHA", "mha"),
    "gqa": Side("GQA (3)", "mha", num_kv_heads=3),
    "mqa": Side("MQA", "mha", num_kv_heads=1),
    "tva_r2": Side("TVA r=2", "tva_default", {"r": 2, "s": 0}),
    "tva_r4": Side("TVA r=4", "tva_default", {"r": 4, "s": 0}),
    "tva_r8": Side("TVA r=8", "tva_default", {"r": 8, "s": 0}),
}
ALL = SIDES | {"tva_r4_s1": Side("TVA r=4, s=1", "tva_default", {"r": 4, "s": 1})}
"""TVA with its compensator is trained at TRAINED alone, and decodes at every length."""

Calls = dict[str, Callable[[], object]]
Layers = Mapping[str, nn.Module]


def forward(layer: nn.Module, length: int) -> Callable[[], object]:
    """A forward without gradients."""
    x = torch.randn(BATCH, length, D_MODEL)

    def call() -> None:
        with torch.no_grad():
            layer(x)

    return call


def train(layer: nn.Module, length: int) -> Callable[[], object]:
    """A forward and a backward to every parameter and to the input."""
    x = torch.randn(BATCH, length, D_MODEL, requires_grad=True)
    upstream = torch.randn(BATCH, length, D_MODEL)
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), wanted, upstream)


def decode(layer: nn.Module, cached: int) -> Callable[[], object]:
    """A forward of one token with ``cached`` others in the cache, to which each call resets it."""
    cache = layer.create_cache(cached + 1)
    token = torch.randn(1, 1, D_MODEL)
    with torch.no_grad():
        layer(torch.randn(1, cached, D_MODEL), cache=cache)

    def call() -> None:
        with torch.no_grad():
            layer(token, cache=cache)
        cache.truncate(cached)

    return call


def timed(calls: Calls, rounds: int) -> Timings:
    for call in calls.values():
        call()  # first calls choose kernels and allocate
    return interleave(calls, baseline="mha", rounds=rounds, warmup=1, sample_ms=20)


def held_bytes(layer: nn.Module, tokens: int) -> int:
    """The bytes of a cache that holds ``tokens`` tokens."""
    cache = layer.create_cache(tokens)
    with torch.no_grad():
        layer(torch.randn(1, tokens, D_MODEL), cache=cache)
    return int(cache.nbytes)


def count_bytes(layers: Layers, tokens: int) -> dict[str, int]:
    """The bytes of each side's filled cache. Raises AssertionError where its provider differs."""
    held = {name: held_bytes(layer, tokens) for name, layer in layers.items()}
    stated = {name: ALL[name].kv_bytes(tokens) for name in layers}
    assert held == stated, f"kv_cache_bytes says {stated}, the caches hold {held}"
    return held


def time_lengths(
    workload: Callable[[nn.Module, int], Callable[[], object]],
    layers: Layers,
    lengths: Sequence[int],
    rounds: int,
) -> dict[int, Timings]:
    """Timings of ``workload`` by length, with fewer rounds for long ones."""
    return {
        length: timed(
            {
                name: workload(layer, length)
                for name, layer in layers.items()
                if name in SIDES or length == TRAINED
            },
            max(3, min(rounds, rounds * 2 * TRAINED // length)),
        )
        for length in lengths
    }


def add_speed_ups(report: Report, title: str, by_length: Mapping[int, Timings]) -> None:
    """Add a table with MHA's time, and how many times as fast the other sides are."""
    others = {name: side.label for name, side in SIDES.items() if name != "mha"}
    report.table(
        f"{title}: milliseconds of MHA, and how many times as fast the others are",
        ["tokens", "MHA, ms", *(f"{label}, ×" for label in others.values())],
        [
            [
                str(length),
                times.median("mha") / 1e6,
                *(times.ratio("mha", over=name).value for name in others),
            ]
            for length, times in by_length.items()
        ],
    )


def add_training(report: Report, by_length: Mapping[int, Timings]) -> None:
    """Add the figures at the length TRAINED, and the plot over all lengths."""
    times = by_length[TRAINED]
    for name in ("tva_r4", "tva_r2"):
        report.ratio(f"mha_over_{name}_train_T{TRAINED}", times, "mha", over=name)
    report.noise(f"mha_over_mha_train_T{TRAINED}", times)
    report.ratio(f"tva_r4_s1_over_tva_r4_train_T{TRAINED}", times, "tva_r4_s1", over="tva_r4")
    report.add(f"mha_train_T{TRAINED}_ms", round(times.median("mha") / 1e6, 1))
    report.plot(
        "train",
        "Forward and backward: how many times as fast as MHA",
        x_label="tokens in a sequence",
        y_label="time of MHA / time",
        x_scale="log",
        series=[speed_ups(name, side.label, by_length) for name, side in SIDES.items()],
    )


def speed_ups(name: str, label: str, by_length: Mapping[int, Timings]) -> Series:
    """MHA's time over the side's by length; MHA's own line is the A/A comparison."""
    ratios = [
        times.noise() if name == "mha" else times.ratio("mha", over=name)
        for times in by_length.values()
    ]
    return Series(
        label,
        [*by_length],
        [ratio.value for ratio in ratios],
        [ratio.low for ratio in ratios],
        [ratio.high for ratio in ratios],
    )


def add_decoding(report: Report, by_length: Mapping[int, Timings]) -> None:
    times = by_length[CACHED]
    report.ratio(f"decode_tva_r4_over_mha_{CACHED}", times, "tva_r4", over="mha")
    report.noise(f"decode_mha_over_mha_{CACHED}", times)
    report.plot(
        "decode",
        "One step of decoding, one layer, batch 1",
        x_label="cached tokens",
        y_label="milliseconds",
        x_scale="log",
        series=[
            Series(side.label, [*by_length], [t.median(name) / 1e6 for t in by_length.values()])
            for name, side in SIDES.items()
        ],
    )


def describe_sides(
    report: Report, layers: Layers, held: Mapping[str, int], decoded: Timings
) -> None:
    rows = [
        [
            side.label,
            sum(parameter.numel() for parameter in layers[name].parameters()),
            held[name] // CACHED,
            side.flops(TRAINED) // TRAINED,
            decoded.median(name) / 1e6,
        ]
        for name, side in ALL.items()
    ]
    columns = [
        "one layer",
        "parameters",
        "KV bytes a token",
        f"forward FLOPs a token at {TRAINED}",
        f"decoding step at {CACHED}, ms",
    ]
    report.table("What a layer is", columns, rows)


def measure(report: Report, quick: bool) -> None:
    torch.manual_seed(0)
    report.machine["threads"] = torch.get_num_threads()
    layers = {name: side.layer() for name, side in ALL.items()}
    rounds = 3 if quick else 30
    lengths = (128, TRAINED) if quick else LENGTHS
    plain = {name: layers[name] for name in SIDES}
    add_speed_ups(report, "Forward", time_lengths(forward, plain, lengths, rounds))
    trained = time_lengths(train, layers, lengths, rounds)
    add_speed_ups(report, "Forward and backward", trained)
    add_training(report, trained)
    held = count_bytes(layers, CACHED)
    report.add("kv_bytes_tva_r4_over_mha", held["tva_r4"] / held["mha"])
    contexts = (128, CACHED) if quick else LENGTHS
    decoded = {
        cached: timed({name: decode(layer, cached) for name, layer in layers.items()}, rounds)
        for cached in contexts
    }
    add_decoding(report, decoded)
    describe_sides(report, layers, held, decoded[CACHED])
    report.note(
        f"d_model {D_MODEL}, {HEADS} heads, batch {BATCH} (decoding: 1), fp32, RoPE. `r` is the "
        "ratio by which TVA compresses a head; GQA has 3 key and value heads, MQA 1. One layer is "
        "timed alone, so a small one stays in the processor's caches as it would not among others."
    )


if __name__ == "__main__":
    run(
        "What do TVA's compressed heads cost, against MHA, GQA and MQA?",
        measure,
        packages=["torch"],
    )
