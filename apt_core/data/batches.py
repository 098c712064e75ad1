"""Cuts tokens into windows, and assigns windows to the optimizer steps of a run.

T is ``seq_len``, B the number of windows in a micro-batch. Window i holds tokens iT..iT+T-1 and
predicts tokens iT+1..iT+T, so every token but the very first is predicted exactly once an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from apt_core.data.sampler import epoch_order, place_of_last
from apt_core.errors import ConfigError, Problem

IGNORED = -100
"""The target of a position that is not predicted (padding)."""

Tokens = npt.NDArray[Any]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: ``input_ids`` and ``targets``, int64 [B, T].

    A target of -100 is ignored; ``num_targets`` counts the others. ``positions`` [B, T] are the
    positions of the tokens in their sequences, by default 0..T-1. ``document_ids`` [B, T] number
    the documents packed in a row, which do not see each other, and are -1 at padding;
    ``num_tokens`` is then the number of positions that are not padding. Without document ids a row
    is one text, and positions without a target are padding. Both counts are on the host, so that
    reading them does not wait for the device.

    Call a model on it by :func:`apt_core.modeling.forward_batch`. Raises ValueError for
    inconsistent parts.
    """

    input_ids: Tensor
    targets: Tensor
    num_targets: int
    positions: Tensor | None = None
    document_ids: Tensor | None = None
    num_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("positions", "document_ids"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != self.input_ids.shape:
                raise ValueError(
                    f"{name} of shape {list(tensor.shape)} for ids of {list(self.input_ids.shape)}"
                )
        if (self.document_ids is None) != (self.num_tokens is None):
            raise ValueError("document_ids and num_tokens are given together, or neither is")

    @classmethod
    def of_ids(cls, input_ids: Tensor) -> Batch:
        """A batch of full rows ``input_ids`` [B, T] for a forward without a loss; the ids also
        stand in as targets."""
        return cls(input_ids, input_ids, input_ids.numel())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        device = torch.device(device)
        if self.input_ids.device == device:
            return self

        def moved(tensor: Tensor) -> Tensor:
            if (
                device.type == "cuda" and tensor.is_cpu
            ):  # a copy of unpinned memory waits for the device
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        return Batch(
            moved(self.input_ids),
            moved(self.targets),
            self.num_targets,
            None if self.positions is None else moved(self.positions),
            None if self.document_ids is None else moved(self.document_ids),
            self.num_tokens,
        )


def num_windows(num_tokens: int, seq_len: int) -> int:
    """The number of windows that predict every token but the first."""
    return -(-(num_tokens - 1) // seq_len)


def cut_windows(tokens: Tokens, windows: Sequence[int] | Tokens, seq_len: int) -> Batch:
    """The batch of ``windows`` of ``tokens``; a window that runs over the end is padded."""
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


class StepPlan:
    """Assigns the windows of a text of ``num_tokens`` tokens to the optimizer steps of a run.

    A step takes ``windows_per_step`` windows of ``seq_len`` tokens, over all processes, in the
    order of :func:`~apt_core.data.sampler.epoch_order`; the last step of an epoch may have fewer
    windows, and the last window of the text fewer targets. All counts of steps, epochs and tokens
    of a run are made by it. It needs the length of the text only, so that a run can be planned
    without text.
    """

    def __init__(
        self, num_tokens: int, *, seq_len: int, windows_per_step: int, seed: int = 0
    ) -> None:
        self.seq_len, self.seed, self.windows_per_step = seq_len, seed, windows_per_step
        self.num_windows = num_windows(num_tokens, seq_len)
        self.steps_per_epoch = -(-self.num_windows // windows_per_step)
        self.targets_per_epoch = num_tokens - 1
        self._missing = self.num_windows * seq_len - self.targets_per_epoch

    def step_windows(self, epoch: int, index: int) -> Tokens:
        """The windows of step ``index`` (from 0) of ``epoch`` (from 1), over all processes.

        Raises IndexError for a step that the epoch does not have.
        """
        if not 0 <= index < self.steps_per_epoch:
            raise IndexError(f"step {index} of an epoch of {self.steps_per_epoch} steps")
        first = index * self.windows_per_step
        order = epoch_order(self.seed, epoch, self.num_windows)
        return order[first : first + self.windows_per_step]

    def step_targets(self, epoch: int, index: int) -> int:
        """The number of target tokens of the step, over all processes."""
        count = len(self.step_windows(epoch, index)) * self.seq_len
        return count - (self._missing if self._is_ragged(epoch, index) else 0)

    def targets_before(self, epoch: int, index: int) -> int:
        """The number of target tokens in the steps of ``epoch`` before step ``index``."""
        windows = min(index * self.windows_per_step, self.num_windows)
        if windows == self.num_windows:
            return self.targets_per_epoch
        if not windows or not self._missing:  # the order of the epoch does not matter
            return windows * self.seq_len
        place = place_of_last(self.seed, epoch, self.num_windows)
        return windows * self.seq_len - (self._missing if place < windows else 0)

    def _is_ragged(self, epoch: int, index: int) -> bool:
        """Whether the step has the window that runs over the end of the text."""
        if not self._missing:
            return False
        place = place_of_last(self.seed, epoch, self.num_windows)
        return place // self.windows_per_step == index


class BatchPlan(StepPlan):
    """Makes the micro-batches of each optimizer step of a run over ``tokens``.

    In an optimizer step each of ``world_size`` processes takes ``grad_accum_steps`` micro-batches
    of ``batch_size`` windows of ``seq_len`` tokens; the last step of an epoch may have fewer
    micro-batches and its last one fewer windows. Micro-batch ``i`` of the step goes to the process
    ``i % world_size``, so that the step is the same for any number of processes. ``tokens`` is a
    1-D array of ids and may be memory-mapped. It is stateless, so a run
    resumes at any step without cost.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        seq_len: int,
        batch_size: int,
        grad_accum_steps: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Raises ConfigError if ``tokens`` does not fill the windows of one step."""
        if min(seq_len, batch_size, grad_accum_steps) < 1:
            raise ValueError("seq_len, batch_size and grad_accum_steps must be at least 1")
        needed = batch_size * grad_accum_steps * world_size
        super().__init__(len(tokens), seq_len=seq_len, windows_per_step=needed, seed=seed)
        self.tokens, self.batch_size = tokens, batch_size
        self.rank, self.world_size = rank, world_size
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
        # Row i is window i with its last target; the last window may be shorter.
        whole = np.lib.stride_tricks.sliding_window_view
        self._rows = whole(tokens, seq_len + 1)[::seq_len] if len(tokens) > seq_len else None

    def step_batches(self, epoch: int, index: int) -> list[Batch]:
        """This process's micro-batches of step ``index`` of ``epoch``; a pure function.

        Every process has the same number, since gradients are summed over the processes; if there
        are not enough windows, some get a micro-batch of padding. Raises IndexError as
        :meth:`step_windows` does.
        """
        chosen, size = self.step_windows(epoch, index), self.batch_size
        stride = size * self.world_size
        ragged = self._is_ragged(epoch, index)
        return [
            self._cut(chosen[first : first + size], ragged=ragged)
            for first in range(self.rank * size, self.rank * size + len(chosen), stride)
        ]

    def _cut(self, windows: Tokens, *, ragged: bool) -> Batch:
        if not len(windows):
            return self._padding()
        if ragged or self._rows is None:
            return cut_windows(self.tokens, windows, self.seq_len)
        rows = self._rows[windows]
        return Batch(
            torch.from_numpy(rows[:, :-1].astype(np.int64)),
            torch.from_numpy(rows[:, 1:].astype(np.int64)),
            len(windows) * self.seq_len,
        )

    def _padding(self) -> Batch:
        """One window without a target."""
        batch = cut_windows(self.tokens, [0], self.seq_len)
        return replace(batch, targets=torch.full_like(batch.targets, IGNORED), num_targets=0)


class EvaluationPlan:
    """Batches of ``batch_size`` consecutive windows of held-out ``tokens``; the last batch may be
    smaller. Raises ConfigError if there is no token to predict."""

    def __init__(self, tokens: Tokens, *, seq_len: int, batch_size: int) -> None:
        self.tokens, self.seq_len, self.batch_size = tokens, seq_len, batch_size
        self.num_windows = num_windows(len(tokens), seq_len) if len(tokens) else 0
        if self.num_windows < 1:
            raise ConfigError(
                Problem(
                    f"the validation text has {len(tokens)} tokens: nothing can be predicted in it",
                    key="data.val_path",
                    hint="give a longer text, or leave data.val_path out to hold out the last "
                    "tenth",
                )
            )
        self.num_batches = -(-self.num_windows // batch_size)

    def stretches(self, limit: int, size: int) -> list[range]:
        """At most ``limit`` ranges of ``size`` windows, spread evenly over the text; the last one
        may be shorter."""
        total = -(-self.num_windows // size)
        count = min(limit, total)
        firsts = [index * total // count * size for index in range(count)]
        return [range(first, min(self.num_windows, first + size)) for first in firsts]

    def batches_of(self, windows: range) -> range:
        """The batches of a range of windows whose size is a multiple of ``batch_size``."""
        return range(windows.start // self.batch_size, -(-windows.stop // self.batch_size))

    def batch(self, index: int) -> Batch:
        first = index * self.batch_size
        windows = range(first, min(self.num_windows, first + self.batch_size))
        return cut_windows(self.tokens, windows, self.seq_len)
