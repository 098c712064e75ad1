"""Batches of windows: those of each optimizer step of a run, and those of an evaluation.

T is ``seq_len``, B the number of windows in a micro-batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from apt_core.data.order import Drawn, Order
from apt_core.data.packing.concat import ConcatWindows
from apt_core.data.packing.rows import IGNORED, Rows, Windows
from apt_core.data.store.format import DamagedStoreError
from apt_core.data.store.parts import ArrayPart

Ints = npt.NDArray[Any]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: ``input_ids`` and ``targets``, int64 [B, T].

    A target of -100 is ignored; ``num_targets`` counts the others. ``positions`` [B, T] are the
    positions of the tokens in their sequences, by default 0..T-1. ``document_ids`` [B, T] number
    the documents packed in a row, which do not see each other, and are -1 at padding; without them
    a row is one text. ``num_tokens`` is the number of positions that are not padding, and
    ``is_token`` [B, T] says which, where there are no document ids; without ``num_tokens``,
    positions without a target are padding. Both counts are on the host, so that reading them does
    not wait for the device.

    Call a model on it by :func:`apt_core.modeling.forward_batch`. Raises ValueError for
    inconsistent parts.
    """

    input_ids: Tensor
    targets: Tensor
    num_targets: int
    positions: Tensor | None = None
    document_ids: Tensor | None = None
    num_tokens: int | None = None
    is_token: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("positions", "document_ids", "is_token"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != self.input_ids.shape:
                raise ValueError(
                    f"{name} of shape {list(tensor.shape)} for ids of {list(self.input_ids.shape)}"
                )
        padded = self.num_tokens is not None and self.num_tokens < self.input_ids.numel()
        if self.num_tokens is None and (self.document_ids, self.is_token) != (None, None):
            raise ValueError("document_ids and is_token need num_tokens")
        if padded and self.document_ids is None and self.is_token is None:
            raise ValueError("num_tokens tells of padding: document_ids or is_token must say where")

    @property
    def token_count(self) -> int:
        """The number of positions that are not padding."""
        return self.num_targets if self.num_tokens is None else self.num_tokens

    def token_mask(self) -> Tensor:
        """Which positions are not padding, bool [B, T]; they need not have a target."""
        if self.num_tokens is None:
            return self.targets != IGNORED
        if self.document_ids is not None:
            return self.document_ids >= 0
        if self.is_token is not None:
            return self.is_token
        return torch.ones_like(self.targets, dtype=torch.bool)

    @classmethod
    def of_rows(cls, rows: Rows) -> Batch:
        """The batch of these rows, which are not copied."""
        document_ids = is_token = None
        if rows.document_ids is not None:
            if rows.packed:
                document_ids = torch.from_numpy(rows.document_ids)
            elif rows.num_tokens < rows.ids.size:
                # One document a row needs no mask: padding comes last.
                is_token = torch.from_numpy(rows.document_ids >= 0)
        return cls(
            torch.from_numpy(rows.ids),
            torch.from_numpy(rows.targets),
            rows.num_targets,
            document_ids=document_ids,
            num_tokens=rows.num_tokens,
            is_token=is_token,
        )

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
            None if self.is_token is None else moved(self.is_token),
        )


def cut_windows(tokens: Ints, windows: Sequence[int] | Ints, seq_len: int) -> Batch:
    """The batch of ``windows`` of one text of ``tokens``, 1-D, each ``seq_len`` long; a window that
    runs over the end is padded."""
    indices = np.asarray(windows, dtype=np.int64)
    return Batch.of_rows(ConcatWindows(ArrayPart(tokens), seq_len).rows(indices))


class Step(NamedTuple):
    """What a process gets for an optimizer step: its micro-batches, and the numbers of targets and
    tokens over all processes."""

    batches: list[Batch]
    num_targets: int
    num_tokens: int


class BatchPlan:
    """Makes the micro-batches of each optimizer step of a run.

    In an optimizer step each of ``world_size`` processes takes micro-batches of ``batch_size``
    windows; the last step of an epoch may have fewer micro-batches and its last one fewer windows.
    Micro-batch ``i`` of the step goes to the process ``i % world_size``, so that the step is the
    same for any number of processes. ``sources`` are the windows of each source of ``order``.
    With ``longest``, columns that are padding in all rows of a micro-batch are cut off.

    What a step sees depends on its number alone, so that a run resumes at any step without cost.
    With ``num_workers`` threads, the batches of the next steps are made meanwhile, until
    :meth:`close`.
    """

    def __init__(
        self,
        order: Order,
        sources: Sequence[Windows],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        longest: bool = False,
        num_workers: int = 0,
    ) -> None:
        self.order, self.steps, self.sources = order, order.steps, sources
        self.seq_len, self.steps_per_epoch = order.steps.seq_len, order.steps.steps_per_epoch
        self.windows_per_step = order.steps.windows_per_step
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._longest = longest
        self._num_workers = num_workers
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[int, Future[Step]]] = deque()

    def step(self, epoch: int, index: int) -> Step:
        """This process's part of step ``index`` (from 0) of ``epoch`` (from 1).

        Every process has the same number of micro-batches, since gradients are summed over the
        processes; if there are not enough windows, some get a micro-batch of padding. Raises
        IndexError for a step that the epoch does not have.
        """
        if not self._num_workers:
            return self._step(epoch, index)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="apt-batches")
        number = (epoch - 1) * self.steps_per_epoch + index
        while self._ahead and self._ahead[0][0] != number:  # another position was asked for
            self._ahead.popleft()[1].cancel()
        first = self._ahead[-1][0] + 1 if self._ahead else number
        end = max(number + 1, int(min(number + self._num_workers + 1, self.order.known_steps)))
        for later in range(first, end):
            position = divmod(later, self.steps_per_epoch)
            future = self._pool.submit(self._step, position[0] + 1, position[1])
            self._ahead.append((later, future))
        return self._ahead.popleft()[1].result()

    def close(self) -> None:
        """End the threads, if there are any; a later :meth:`step` starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            self._ahead.clear()

    def grow(self, windows: Windows) -> None:
        """Draw from these windows of the only source, which has more of them, from the next step
        on."""
        self.sources = [windows]

    def drawn(self, epoch: int, index: int) -> Drawn:
        """The windows of a step, over all processes."""
        return self.order.step(epoch, index)

    def batch(self, drawn: Drawn) -> Batch:
        """The batch of these windows."""
        return Batch.of_rows(self._rows(drawn))

    def _step(self, epoch: int, index: int) -> Step:
        drawn, size = self.order.step(epoch, index), self.batch_size
        count = len(drawn.windows)
        batches = [
            self._micro_batch(
                Drawn(drawn.sources[first : first + size], drawn.windows[first : first + size])
            )
            for first in range(self.rank * size, self.rank * size + count, size * self.world_size)
        ]
        if self.world_size == 1:
            targets = sum(batch.num_targets for batch in batches)
        else:
            targets = self._num_targets(drawn)
        return Step(batches, targets, count * self.seq_len)

    def _micro_batch(self, drawn: Drawn) -> Batch:
        if len(drawn.windows):
            return self.batch(drawn)
        ids = self.sources[0].rows(np.zeros(1, dtype=np.int64)).ids
        padding = np.full_like(ids, -1)
        return Batch.of_rows(Rows(ids, np.full_like(ids, IGNORED), 0, 0, padding))

    def _rows(self, drawn: Drawn) -> Rows:
        if len(self.sources) == 1:
            rows = self.sources[0].rows(drawn.windows)
        else:
            rows = _interleaved(self.sources, self.order.names, drawn)
        return cut_padding(rows) if self._longest else rows

    def _num_targets(self, drawn: Drawn) -> int:
        if len(self.sources) == 1:
            return self.sources[0].num_targets(drawn.windows)
        total = 0
        for number, windows in enumerate(self.sources):
            with _naming(self.order.names[number]):
                total += windows.num_targets(drawn.windows[drawn.sources == number])
        return total


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Say of which source of a mixture a store is damaged."""
    try:
        yield
    except DamagedStoreError as error:
        if not source:
            raise
        raise DamagedStoreError(f"data.mixture, source {source}: {error}") from error


def _interleaved(sources: Sequence[Windows], names: Sequence[str], drawn: Drawn) -> Rows:
    """The rows of windows of several sources with ``names``, in the order of ``drawn``."""
    shape = (len(drawn.windows), sources[0].seq_len)
    input_ids, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
    document_ids, apart, packed = np.zeros(shape, np.int64), False, False
    num_targets = num_tokens = 0
    for number in np.unique(drawn.sources).tolist():
        chosen = drawn.sources == number
        with _naming(names[number]):
            rows = sources[number].rows(drawn.windows[chosen])
        input_ids[chosen], targets[chosen] = rows.ids, rows.targets
        num_targets, num_tokens = num_targets + rows.num_targets, num_tokens + rows.num_tokens
        if rows.document_ids is not None:
            document_ids[chosen], apart = rows.document_ids, True
            packed = packed or rows.packed
    documents = document_ids if apart else None
    return Rows(input_ids, targets, num_targets, num_tokens, documents, packed)


def cut_padding(rows: Rows) -> Rows:
    """The same rows without the columns that are padding in all of them."""
    if rows.document_ids is None:
        return rows
    used = (rows.document_ids >= 0).any(axis=0)
    width = max(1, int(np.count_nonzero(used)))  # padding comes last
    ids, targets, documents = (
        np.ascontiguousarray(array[:, :width])
        for array in (rows.ids, rows.targets, rows.document_ids)
    )
    return replace(rows, ids=ids, targets=targets, document_ids=documents)


class EvaluationPlan:
    """Batches of ``batch_size`` consecutive windows, those of one source after the other; the last
    batch may be smaller. Several sources have ``names``."""

    def __init__(
        self, sources: Sequence[Windows], *, batch_size: int, names: Sequence[str] = ()
    ) -> None:
        self.sources, self.batch_size = sources, batch_size
        self._names = names or [""] * len(sources)
        self.seq_len = sources[0].seq_len
        self._ends = np.cumsum([len(windows) for windows in sources])
        self.num_windows = int(self._ends[-1])
        self.num_batches = -(-self.num_windows // batch_size)

    def stretches(self, limit: int, size: int) -> list[range]:
        """At most ``limit`` ranges of ``size`` windows, spread evenly over all; the last one may be
        shorter."""
        total = -(-self.num_windows // size)
        count = min(limit, total)
        firsts = [index * total // count * size for index in range(count)]
        return [range(first, min(self.num_windows, first + size)) for first in firsts]

    def batches_of(self, windows: range) -> range:
        """The batches of a range of windows whose size is a multiple of ``batch_size``."""
        return range(windows.start // self.batch_size, -(-windows.stop // self.batch_size))

    def rows(self, windows: range) -> Rows:
        """These windows as rows."""
        numbers = np.arange(windows.start, windows.stop)
        if len(self.sources) == 1:
            return self.sources[0].rows(numbers)
        sources = np.searchsorted(self._ends, numbers, side="right")
        before = np.concatenate([[0], self._ends[:-1]])
        return _interleaved(self.sources, self._names, Drawn(sources, numbers - before[sources]))

    def batch(self, index: int) -> Batch:
        first = index * self.batch_size
        return Batch.of_rows(
            self.rows(range(first, min(self.num_windows, first + self.batch_size)))
        )
