"""Batches: windows of consecutive tokens, and which of them make which optimizer step.

Legend: T ``seq_len``, B windows in a micro-batch. Window i holds tokens iT..iT+T-1 and predicts
tokens iT+1..iT+T, so every token but the very first is predicted exactly once an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from apt_core.data.sampler import epoch_order
from apt_core.errors import ConfigError, Problem

IGNORED = -100
"""The target of a position that is not predicted (padding)."""

Tokens = npt.NDArray[Any]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: ``input_ids`` and ``targets``, int64 [B, T], and how many targets count.

    A target of -100 is ignored. ``num_targets`` is known without asking the device.
    """

    input_ids: Tensor
    targets: Tensor
    num_targets: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.num_targets,
        )


def num_windows(num_tokens: int, seq_len: int) -> int:
    """How many windows it takes to predict every token but the first."""
    return -(-(num_tokens - 1) // seq_len)


def cut_windows(tokens: Tokens, windows: Sequence[int] | Tokens, seq_len: int) -> Batch:
    """The batch of these windows of ``tokens``; a window that runs over the end is padded."""
    starts = np.asarray(windows, dtype=np.int64) * seq_len
    index = starts[:, None] + np.arange(seq_len + 1)
    last = len(tokens) - 1
    cut = tokens[np.minimum(index, last)].astype(np.int64)
    targets = cut[:, 1:].copy()
    beyond = index[:, 1:] > last
    targets[beyond] = IGNORED
    return Batch(
        torch.from_numpy(cut[:, :-1].copy()),
        torch.from_numpy(targets),
        int(beyond.size - beyond.sum()),
    )


class BatchPlan:
    """Which micro-batches make each optimizer step of a run over ``tokens``.

    An optimizer step takes ``grad_accum_steps`` micro-batches of ``batch_size`` windows of
    ``seq_len`` tokens, in the order of :func:`~apt_core.data.sampler.epoch_order`; the last step of
    an epoch may have fewer micro-batches and its last one fewer windows. ``tokens`` is a 1-D array
    of ids and may be memory-mapped. Nothing has a state, so a run resumes anywhere at no cost.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        seq_len: int,
        batch_size: int,
        grad_accum_steps: int = 1,
        seed: int = 0,
    ) -> None:
        """Raises ConfigError where ``tokens`` does not fill one batch of one step."""
        if min(seq_len, batch_size, grad_accum_steps) < 1:
            raise ValueError("seq_len, batch_size and grad_accum_steps must be at least 1")
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.batch_size, self.grad_accum_steps = batch_size, grad_accum_steps
        self.num_windows = num_windows(len(tokens), seq_len)
        needed = batch_size * grad_accum_steps
        if self.num_windows < needed:
            raise ConfigError(
                Problem(
                    f"the training text has {len(tokens):,} tokens, which is {self.num_windows} "
                    f"windows of {seq_len}; one optimizer step takes {needed}",
                    key="data.train_path",
                    hint="give more text, or lower training.batch_size, "
                    "training.grad_accum_steps or data.max_length",
                )
            )
        self.steps_per_epoch = -(-self.num_windows // needed)
        self.targets_per_epoch = len(tokens) - 1

    def step_batches(self, epoch: int, index: int) -> list[Batch]:
        """The micro-batches of step ``index`` (from 0) of ``epoch`` (from 1); a pure function.

        Raises IndexError for a step that the epoch does not have.
        """
        if not 0 <= index < self.steps_per_epoch:
            raise IndexError(f"step {index} of an epoch of {self.steps_per_epoch} steps")
        size = self.batch_size * self.grad_accum_steps
        chosen = epoch_order(self.seed, epoch, self.num_windows)[index * size : (index + 1) * size]
        return [
            cut_windows(self.tokens, chosen[first : first + self.batch_size], self.seq_len)
            for first in range(0, len(chosen), self.batch_size)
        ]


def evaluation_batches(
    tokens: Tokens, *, seq_len: int, batch_size: int, limit: int | None = None
) -> Iterator[Batch]:
    """The windows of ``tokens`` in order, ``batch_size`` at a time, the last batch maybe shorter.

    With ``limit``, at most so many batches, spread evenly over the text. Raises ConfigError at once
    where there is nothing to predict.
    """
    total = num_windows(len(tokens), seq_len) if len(tokens) else 0
    if total < 1:
        raise ConfigError(
            Problem(
                f"the validation text has {len(tokens)} tokens: nothing can be predicted in it",
                key="data.val_path",
                hint="give a longer text, or leave data.val_path out to hold out the last tenth",
            )
        )
    batches = -(-total // batch_size)
    count = batches if limit is None else min(limit, batches)
    chosen = [index * batches // count for index in range(count)]
    return (
        cut_windows(
            tokens,
            range(index * batch_size, min(total, (index + 1) * batch_size)),
            seq_len,
        )
        for index in chosen
    )
