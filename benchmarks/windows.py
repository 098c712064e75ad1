"""What attention in a window costs by the length of a text, against attention to all of it.

The sides are layers of ``flex`` and ``mha`` with the same weights, in fp32 with RoPE. One process
times them in turns: a forward with its backward, and one step of decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import process_time_ns

import torch
from torch import nn

from _harness import Report, Timings, interleave, run
from apt_core.modeling.layers import MHAProvider, RoPEProvider
from apt_plugins.flash_attn.flex import FlexProvider

D_MODEL, HEADS = 256, 4
LENGTHS = (1024, 2048, 4096, 8192)
WINDOWS = (128, 512, 2048)
DOCUMENT = 700
"""The length of packed documents."""

SHORT, LONG = 2048, LENGTHS[-1]
"""The lengths of the figures."""


def layers() -> dict[str, nn.Module]:
    """All sides, with the same weights."""
    options = {"max_seq_len": LONG + 1, "position": RoPEProvider()}
    mha = MHAProvider().create_layer(D_MODEL, HEADS, **options)
    made = {"mha": mha}
    for window in WINDOWS:
        made[f"w{window}"] = FlexProvider({"window": window}).create_layer(
            D_MODEL, HEADS, **options
        )
        made[f"w{window}"].load_state_dict(mha.state_dict())
    return made


def train(layer: nn.Module, length: int, *, packed: bool = False) -> Callable[[], object]:
    """A forward and a backward to every parameter and to the input."""
    x = torch.randn(1, length, D_MODEL, requires_grad=True)
    upstream = torch.randn(1, length, D_MODEL)
    mask = torch.arange(length)[None] // DOCUMENT if packed else None
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x, mask=mask), wanted, upstream)


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


def timed(calls: Mapping[str, Callable[[], object]], baseline: str, rounds: int) -> Timings:
    for call in calls.values():
        call()  # first calls choose kernels and allocate
    return interleave(
        dict(calls), baseline=baseline, rounds=rounds, calls=1, warmup=0, clock=process_time_ns
    )


def add_times(report: Report, title: str, by_length: Mapping[int, Timings]) -> None:
    """Add a table of milliseconds by length and window."""
    report.table(
        f"{title}, milliseconds",
        ["tokens", "all", *(f"window {window}" for window in WINDOWS)],
        [
            [
                str(length),
                *(times.median(name) / 1e6 for name in ("mha", *(f"w{w}" for w in WINDOWS))),
            ]
            for length, times in by_length.items()
        ],
    )


def measure(report: Report, quick: bool) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    report.machine["threads"] = 1
    made, rounds = layers(), 2 if quick else 5
    lengths = (SHORT, LONG) if quick else LENGTHS
    trained = {
        length: timed({name: train(each, length) for name, each in made.items()}, "mha", rounds)
        for length in lengths
    }
    add_times(report, "Forward and backward", trained)
    long = trained[LONG]
    for window in WINDOWS:
        report.ratio(f"mha_over_w{window}_train_T{LONG}", long, "mha", over=f"w{window}")
    report.noise(f"mha_over_mha_train_T{LONG}", long)
    for name in made:
        grown = long.median(name) / trained[SHORT].median(name)
        report.add(f"{name}_train_T{LONG}_over_T{SHORT}", round(grown, 2))
    narrow = made[f"w{WINDOWS[0]}"]
    packed = timed(
        {"plain": train(narrow, LONG), "packed": train(narrow, LONG, packed=True)}, "plain", 5
    )
    report.ratio(f"packed_over_plain_w{WINDOWS[0]}_T{LONG}", packed, "packed", over="plain")
    decoded = {
        cached: timed({name: decode(each, cached) for name, each in made.items()}, "mha", 50)
        for cached in lengths
    }
    add_times(report, "One step of decoding", decoded)
    for window in WINDOWS:
        report.ratio(f"mha_over_w{window}_decode_{LONG}", decoded[LONG], "mha", over=f"w{window}")
    report.note(
        f"One layer of d_model {D_MODEL} with {HEADS} heads, one text, one thread, fp32. "
        f"T{LONG}_over_T{SHORT} is 4 where time grows with the length, 16 where it grows with its "
        f"square. Packed texts hold documents of {DOCUMENT} tokens, given as ids."
    )


if __name__ == "__main__":
    run(
        "What does attention in a window cost, against attention to all of a text?",
        measure,
        packages=["torch"],
    )
