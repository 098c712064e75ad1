"""The sizes of models among which a profile for a budget chooses, with what goes with each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apt_core.starting.budget import Budget


@dataclass(frozen=True)
class Size:
    """Width and depth of a model, and the length of its sequences."""

    d_model: int
    num_layers: int
    max_seq_len: int

    @property
    def num_heads(self) -> int:
        """Heads of 32, of 64 from a width of 512 on."""
        return max(2, self.d_model // (64 if self.d_model >= 512 else 32))


SIZES = (
    Size(32, 1, 128), Size(64, 2, 128), Size(96, 3, 256), Size(128, 4, 256), Size(192, 4, 256),
    Size(256, 6, 256), Size(384, 6, 512), Size(512, 8, 512), Size(768, 12, 1024),
    Size(1024, 16, 1024), Size(1536, 24, 1024), Size(2048, 24, 2048),
)  # fmt: skip
"""From the smallest to the largest."""

WINDOWS = 64
"""Sequences that the data should have at the least, so that they can be drawn in another order."""

SHORTEST = 16
LEAST_TOKENS, MOST_TOKENS = 1_024, 2**19
"""The tokens of a step."""

STEPS = 2_000
"""About how many steps a run should have: with fewer a small batch learns more, with more a large
one is computed faster."""


def length_of(size: Size, tokens: int) -> int:
    """The length of the sequences of a model on so many tokens of text."""
    length = size.max_seq_len
    while length > SHORTEST and tokens // length < WINDOWS:
        length //= 2
    return length


def batch_of(length: int, tokens: float) -> int:
    """The sequences of a step in a run of so many tokens."""
    wanted = min(max(tokens / STEPS, LEAST_TOKENS), MOST_TOKENS)
    batch = 1
    while batch * 2 * length <= wanted:
        batch *= 2
    return batch


def draft(
    budget: Budget, size: Size, tokens: int, batch: int, threads: int | None
) -> dict[str, Any]:
    """The keys of a profile for a model of this size, without the length of the run."""
    data = list(budget.data)
    hardware: dict[str, Any] = {"device": budget.device}
    if threads is not None:
        hardware["num_threads"] = threads
    return {
        "model": {
            "d_model": size.d_model,
            "num_heads": size.num_heads,
            "num_layers": size.num_layers,
            "d_ff": 4 * size.d_model,
            "max_seq_len": length_of(size, tokens),
        },
        "training": {"batch_size": batch},
        "data": {"train_path": data[0] if len(data) == 1 else data},
        "hardware": hardware,
    }
