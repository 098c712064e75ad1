"""Answers prompts by the most likely tokens, many at a time, and compares them with responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apt_core.data.store.parts import TokenPart
from apt_core.modeling.modes import eval_mode


@dataclass(frozen=True)
class Pair:
    """The ids of a prompt and of the response to it, with the end of the document if it has one."""

    prompt: Sequence[int]
    response: Sequence[int]


def pairs_of(part: TokenPart) -> Iterator[Pair]:
    """The pairs among the documents of ``part``: those that are learned from a token on which is
    not the first. Conversations, of which several stretches are learned, are left out."""
    if not part.marked:
        return
    for document in range(part.num_documents):
        start, stop = (int(each) for each in part.spans(document, document + 1))
        learned = part.marks(start, stop)
        first = int(learned.argmax())
        if first and learned[first:].all():
            ids = part.read(start, stop).tolist()
            yield Pair(ids[:first], ids[first:])


@torch.no_grad()
def answers(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    device: torch.device,
    vocab_size: int,
    max_seq_len: int,
    batch_size: int = 256,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[list[int]]:
    """What ``model`` answers to the prompt of each of ``pairs``: in turn the most likely of the
    first ``vocab_size`` ids, as many as the longest response of its batch has.

    An answer ends early where ``max_seq_len`` is reached; the answer to a prompt that leaves no
    room is empty. ``precision`` makes the context in which forwards are computed. The modes of
    modules are restored at the end.
    """
    found: list[list[int]] = [[] for _ in pairs]
    # Prompts of one length need no padding.
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i].prompt), len(pairs[i].response)))
    with eval_mode(model):
        for batch in _batches(order, pairs, batch_size):
            prompts = torch.tensor([list(pairs[i].prompt) for i in batch], device=device)
            room = max_seq_len - prompts.shape[1]
            length = min(room, max(len(pairs[i].response) for i in batch))
            if length <= 0:
                continue
            with precision():
                rows = _continued(model, prompts, length, vocab_size)
            for i, row in zip(batch, rows.tolist(), strict=True):
                found[i] = row
    return found


def _batches(
    order: Sequence[int], pairs: Sequence[Pair], batch_size: int
) -> Iterator[Sequence[int]]:
    start = 0
    while start < len(order):
        length, stop = len(pairs[order[start]].prompt), start
        while stop < min(len(order), start + batch_size):
            if len(pairs[order[stop]].prompt) != length:
                break
            stop += 1
        yield order[start:stop]
        start = stop


def _continued(model: nn.Module, prompts: Tensor, length: int, vocab_size: int) -> Tensor:
    """The ``length`` tokens after ``prompts`` [B, P], int64 [B, length]."""
    create: Callable[[int], Any] | None = getattr(model, "create_caches", None)
    total = prompts.shape[1] + length
    caches = None if create is None else create(total)
    text, unread = prompts, prompts
    while text.shape[1] < total:
        if caches is None:
            logits = model(text).logits
        else:
            logits = model(unread, caches=caches).logits
            if any(cache.length != text.shape[1] for cache in caches):
                # A cache does not hold what its layer read.
                caches = None
                continue
        unread = logits[:, -1:, :vocab_size].argmax(-1)
        text = torch.cat([text, unread], dim=1)
    return text[:, prompts.shape[1] :]


def character_f1(answer: str, response: str) -> float:
    """The harmonic mean of precision and recall of the characters, each as often as it occurs,
    without regard to their order: 1 where they are the same, 0 where none is.

    >>> character_f1("abc", "abd")
    0.6666666666666666
    """
    if not answer or not response:
        return float(answer == response)
    shared = (Counter(answer) & Counter(response)).total()
    return 2 * shared / (len(answer) + len(response))
