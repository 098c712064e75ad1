"""What a layer of experts costs, against a dense feed-forward and transformers' Mixtral block.

One process times a forward with its backward, of all sides in turns, in fp32. The dense layer has
as many hidden units as the experts of one token together, and so the same number of floating-point
operations, except for the router's. Mixtral's block has the same sizes; of the implementations of
its experts, the fastest on this machine is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from _harness import Report, Series, Timings, interleave, run
from apt_core.modeling.layers import SwiGLU
from apt_plugins.moe.experts import Experts
from apt_plugins.moe.layer import MoELayer
from apt_plugins.moe.router import TopKRouter

TOKENS, D_MODEL, D_EXPERT, TOP_K = 2048, 256, 512, 2
SIZES = (8, 64)
"""Numbers of experts with a figure."""

MORE_SIZES = (2, 4, 16, 32)
"""Further numbers of experts, for the plot."""

IMPLEMENTATIONS = {"eager": TOKENS, "grouped_mm": TOKENS, "batched_mm": TOKENS // 8}
"""Implementations of Mixtral's experts, and the number of tokens with which each is tried.
batched_mm copies an expert's matrices for each of its tokens, so it is tried with fewer: its time
and memory are proportional to them."""


def ours(experts: int) -> nn.Module:
    return MoELayer(
        TopKRouter(D_MODEL, experts, TOP_K), Experts(experts, D_MODEL, D_EXPERT), top_k=TOP_K
    )


def mixtral(experts: int, implementation: str) -> nn.Module:
    config = MixtralConfig(
        hidden_size=D_MODEL,
        intermediate_size=D_EXPERT,
        num_local_experts=experts,
        num_experts_per_tok=TOP_K,
        experts_implementation=implementation,
    )
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0.0, 0.02)
    return block


def train(layer: nn.Module, tokens: int = TOKENS) -> Callable[[], object]:
    """A forward and a backward to every parameter and to the input."""
    x = torch.randn(1, tokens, D_MODEL, requires_grad=True)
    upstream = torch.randn(1, tokens, D_MODEL)
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), wanted, upstream)


def seconds(call: Callable[[], object], times: int = 3) -> float:
    """The time of the fastest of ``times`` calls, after one that is not timed."""
    call()
    best = float("inf")
    for _ in range(times):
        started = perf_counter()
        call()
        best = min(best, perf_counter() - started)
    return best


def try_implementations(experts: int) -> dict[str, float]:
    """Milliseconds for TOKENS tokens, by implementation."""
    return {
        name: seconds(train(mixtral(experts, name), tokens)) * 1e3 * TOKENS / tokens
        for name, tokens in IMPLEMENTATIONS.items()
    }


def time_size(experts: int, implementation: str, rounds: int) -> Timings:
    sides = {
        "dense": train(SwiGLU(D_MODEL, TOP_K * D_EXPERT)),
        "moe": train(ours(experts)),
        "mixtral": train(mixtral(experts, implementation)),
    }
    return interleave(sides, baseline="dense", rounds=rounds, calls=1, warmup=3)


def measure(report: Report, quick: bool) -> None:
    torch.manual_seed(0)
    report.machine["threads"] = torch.get_num_threads()
    tried = {experts: try_implementations(experts) for experts in SIZES}
    fastest = {experts: min(times, key=times.__getitem__) for experts, times in tried.items()}
    others = () if quick else MORE_SIZES
    rounds = 5 if quick else 60
    timed = {
        experts: time_size(experts, fastest.get(experts, "grouped_mm"), rounds)
        for experts in sorted((*SIZES, *others))
    }
    for experts in SIZES:
        times = timed[experts]
        report.ratio(f"moe_E{experts}_over_dense", times, "moe", over="dense")
        report.ratio(f"mixtral_over_moe_E{experts}", times, "mixtral", over="moe")
        report.noise(f"dense_over_dense_E{experts}", times)
    report.add("dense_ms", round(timed[SIZES[0]].median("dense") / 1e6, 1))
    describe(report, timed, tried)


def describe(
    report: Report, timed: Mapping[int, Timings], tried: Mapping[int, Mapping[str, float]]
) -> None:
    report.plot(
        "experts",
        "Forward and backward: how many times as long as the dense layer of equal FLOPs",
        x_label="experts",
        y_label="time / time of the dense layer",
        x_scale="log",
        series=[
            over_dense("experts of APT", "moe", timed),
            over_dense("Mixtral of transformers", "mixtral", timed),
        ],
    )
    report.table(
        "Milliseconds of a forward and backward",
        ["experts", "dense", "APT", "Mixtral"],
        [
            [str(experts), *(times.median(side) / 1e6 for side in ("dense", "moe", "mixtral"))]
            for experts, times in timed.items()
        ],
    )
    report.table(
        "Milliseconds of Mixtral's implementations, the fastest of three",
        ["experts", *IMPLEMENTATIONS],
        [[str(experts), *times.values()] for experts, times in tried.items()],
    )
    report.note(
        f"{TOKENS:,} tokens, width {D_MODEL}, experts of {D_EXPERT} hidden units (SwiGLU), "
        f"{TOP_K} of them a token, fp32, no capacity; the dense layer has {TOP_K * D_EXPERT} "
        "hidden units. Gradients go to the input and to every parameter. The matrices of 64 "
        "experts are 96 MiB, which are read twice, and their gradients written, for as many "
        "operations as the dense layer does with 3 MiB."
    )


def over_dense(label: str, side: str, timed: Mapping[int, Timings]) -> Series:
    ratios = [times.ratio(side, over="dense") for times in timed.values()]
    return Series(
        label,
        [*timed],
        [ratio.value for ratio in ratios],
        [ratio.low for ratio in ratios],
        [ratio.high for ratio in ratios],
    )


if __name__ == "__main__":
    run(
        "What does a mixture of experts cost, against a dense layer of equal FLOPs and Mixtral's?",
        measure,
        packages=["torch", "transformers"],
    )
