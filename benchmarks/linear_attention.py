"""What linear attention costs against multi-head attention on SDPA, from short texts to long ones.

Layers of the registry at one width, in fp32. One process times them in turns: a forward with its
backward, and one step of decoding. Then whole models are trained, TVA and linear attention for the
same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from _harness import Report, Series, Timings, interleave, run
from apt_core.modeling.layers import MHAProvider, RoPEProvider
from apt_plugins.linear_attn.layer import LinearAttentionProvider
from quality import (
    DEFAULT,
    Variant,
    compare,
    mean_and_spread,
    one_thread,
    train_all,
    training_step,
)
from quality import SETTINGS as SETTINGS_OF_MODELS

D_MODEL, HEADS = 256, 4
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LONG = 8192
"""The length of the figures."""

SIDES = {
    "mha": "MHA",
    "linear": "linear, chunks of 64",
    "linear_c32": "linear, chunks of 32",
    "linear_h8": "linear, 8 heads of 32",
}
SETTINGS: Mapping[str, Mapping[str, int]] = {
    "linear": {},
    "linear_c32": {"chunk_size": 32},
    "linear_h8": {"num_heads": 8, "chunk_size": 32},
}


def linear(label: str, **model: Any) -> Variant:
    return Variant(label, model, ("linear_attn",))


MODELS = {
    "tva": DEFAULT,
    "linear": linear("linear", attention_name="linear_causal"),
    "hybrid": linear(
        "three linear layers, one of TVA", attention_pattern=[*3 * ["linear_causal"], "tva_default"]
    ),
}


def layer_of(name: str) -> nn.Module:
    sizes = {"max_seq_len": max(LENGTHS) + 1, "position": RoPEProvider()}
    provider = MHAProvider() if name == "mha" else LinearAttentionProvider(SETTINGS[name])
    return provider.create_layer(D_MODEL, HEADS, **sizes)


def train(layer: nn.Module, length: int) -> Callable[[], object]:
    """A forward and a backward to every parameter and to the input."""
    x = torch.randn(1, length, D_MODEL, requires_grad=True)
    upstream = torch.randn(1, length, D_MODEL)
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), wanted, upstream)


def decode(layer: nn.Module, cached: int) -> Callable[[], object]:
    """A forward of one token after ``cached`` others, as each call finds them."""
    kept, token = layer.create_cache(cached + 1), torch.randn(1, 1, D_MODEL)
    with torch.no_grad():
        layer(torch.randn(1, cached, D_MODEL), cache=kept)

    def call() -> None:
        # A fork of a state is free, and so is cutting keys and values back.
        cache = kept if hasattr(kept, "truncate") else kept.fork()
        with torch.no_grad():
            layer(token, cache=cache)
        if cache is kept:
            cache.truncate(cached)

    return call


def crossing(by_length: Mapping[int, Timings]) -> int:
    """The first length at which linear attention is the faster one."""
    for length, times in by_length.items():
        if times.ratio("mha", over="linear").value > 1:
            return length
    return 0


def add(report: Report, title: str, name: str, by_length: Mapping[int, Timings]) -> None:
    others = [side for side in SIDES if side != "mha"]
    report.table(
        f"{title}: milliseconds of MHA, and how many times as fast the others are",
        ["tokens", "MHA, ms", *(f"{SIDES[side]}, ×" for side in others)],
        [
            [
                str(length),
                times.median("mha") / 1e6,
                *(times.ratio("mha", over=side).value for side in others),
            ]
            for length, times in by_length.items()
        ],
    )
    report.plot(
        name,
        title,
        x_label="tokens",
        y_label="milliseconds",
        x_scale="log",
        series=[
            Series(label, [*by_length], [t.median(side) / 1e6 for t in by_length.values()])
            for side, label in SIDES.items()
        ],
    )


def add_quality(report: Report, quick: bool) -> None:
    """Train the models of one backbone for as long as TVA takes for some steps."""
    steps, seeds = (10, 2) if quick else (500, 3)
    threads = torch.get_num_threads()
    one_thread()
    times = interleave(
        {name: training_step(variant) for name, variant in MODELS.items()},
        baseline="tva",
        rounds=3 if quick else 25,
        calls=1,
    )
    in_time = {name: round(steps * times.ratio("tva", over=name).value) for name in MODELS}
    losses = train_all([(name, MODELS[name], in_time[name]) for name in MODELS], seeds)
    torch.set_num_threads(threads)
    report.table(
        f"Whole models, windows of {SETTINGS_OF_MODELS.max_seq_len} bytes: nats per byte held out "
        f"after the time of {steps} steps of TVA, mean of {seeds} seeds ± the farthest",
        ["attention", "time of a step over TVA's", "steps", "loss"],
        [
            [
                variant.label,
                times.ratio(name, over="tva").value,
                in_time[name],
                mean_and_spread(losses[name, in_time[name]]),
            ]
            for name, variant in MODELS.items()
        ],
    )
    ours = losses["tva", in_time["tva"]]
    for name in ("linear", "hybrid"):
        compare(report, f"val_loss_{name}_minus_tva_equal_time", losses[name, in_time[name]], ours)


def measure(report: Report, quick: bool) -> None:
    torch.manual_seed(0)
    report.machine["threads"] = torch.get_num_threads()
    layers = {name: layer_of(name) for name in SIDES}
    lengths = (512, 1024) if quick else LENGTHS
    last = LONG if LONG in lengths else lengths[-1]
    trained, decoded = {}, {}
    for length in lengths:
        calls = {name: train(layer, length) for name, layer in layers.items()}
        long = length > LONG  # seconds a call
        rounds = 2 if long else 3 if quick or length > 2048 else 7
        trained[length] = interleave(
            calls, baseline="mha", rounds=rounds, calls=1, warmup=0 if long else 1
        )
        calls = {name: decode(layer, length) for name, layer in layers.items()}
        decoded[length] = interleave(calls, baseline="mha", rounds=9, calls=10, warmup=1)
    add(report, "Forward and backward, one layer", "train", trained)
    add(report, "One step of decoding, one layer, batch 1", "decode", decoded)
    for side in SETTINGS:
        report.ratio(f"mha_over_{side}_train_T{last}", trained[last], "mha", over=side)
    report.noise(f"mha_over_mha_train_T{last}", trained[last])
    report.add("faster_from_T", crossing(trained))
    first, end = lengths[0], lengths[-1]
    for side in ("mha", "linear"):
        value = decoded[end].median(side) / decoded[first].median(side)
        report.add(f"decode_{side}_T{end}_over_T{first}", round(value, 3))
    add_quality(report, quick)
    report.add("state_bytes", float(held_bytes(layers["linear"])))
    report.note(
        f"One layer {D_MODEL} wide with {HEADS} heads, a text at a time. `faster_from_T` is the "
        "shortest of these lengths at which a forward and backward of `linear` takes less time "
        "than that of MHA; 0: none."
    )


def held_bytes(layer: nn.Module) -> int:
    cache = layer.create_cache(8)
    with torch.no_grad():
        layer(torch.randn(1, 8, D_MODEL), cache=cache)
    return int(cache.nbytes)


if __name__ == "__main__":
    run("From what length on is linear attention faster than multi-head attention?", measure)
