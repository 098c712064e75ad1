"""Answers prompts by the most likely tokens, many at a time, and compares them with responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from apt_core.data.store.parts import TokenPart
from apt_core.inference.decoding import Decoder
from apt_core.inference.texts import Text
from apt_core.modeling.modes import eval_mode


@dataclass(frozen=True)
class Pair:
    """The ids of a prompt and of the response to it, with the end of the document if it has one."""

    prompt: Sequence[int]
    response: Sequence[int]


BLOCK = 1 << 14
"""The documents whose marks are looked at at a time."""


def pairs_of(part: TokenPart) -> Iterator[Pair]:
    """The pairs among the documents of ``part``; see :func:`pair_documents`."""
    for document in pair_documents(part).tolist():
        yield pair_at(part, document)


def pair_documents(part: TokenPart) -> npt.NDArray[np.int64]:
    """The numbers of the documents of ``part`` that are pairs: those that are learned from a token
    on which is not the first. Conversations, of which several stretches are learned, are none."""
    found = [np.empty(0, np.int64)]
    for first in range(0, part.num_documents if part.marked else 0, BLOCK):
        spans = part.spans(first, min(first + BLOCK, part.num_documents)).astype(np.int64)
        learned = part.marks(int(spans[0]), int(spans[-1]))
        starts, lasts = spans[:-1] - spans[0], spans[1:] - spans[0] - 1
        filled = np.flatnonzero(lasts >= starts)
        starts, lasts = starts[filled], lasts[filled]
        # How often learning begins, up to each token.
        begins = np.concatenate([[0], np.cumsum(~learned[:-1] & learned[1:])])
        once = begins[lasts] - begins[starts] == 1
        found.append(first + filled[once & ~learned[starts] & learned[lasts]])
    return np.concatenate(found)


def pair_at(part: TokenPart, document: int) -> Pair:
    """The pair that a document of :func:`pair_documents` is."""
    start, stop = (int(each) for each in part.spans(document, document + 1))
    first = int(part.marks(start, stop).argmax())
    ids = part.read(start, stop).tolist()
    return Pair(ids[:first], ids[first:])


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
    first ``vocab_size`` ids, as many as its response has; ``batch_size`` are worked on at once.

    An answer ends early where ``max_seq_len`` is reached; the answer to a prompt that leaves no
    room is empty. ``precision`` makes the context in which forwards are computed. The modes of
    modules are restored at the end.
    """
    found: list[list[int]] = [[] for _ in pairs]
    decoder = Decoder(model, device=device, max_seq_len=max_seq_len, vocab_size=vocab_size)
    with eval_mode(model):
        decoder.refresh()
        # Those of one length together, so that little is padding.
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].prompt), reverse=True)
        active: dict[int, Text] = {}
        while order or active:
            while order and len(active) < batch_size:
                index = order.pop()
                prompt = pairs[index].prompt
                length = min(max_seq_len - len(prompt), len(pairs[index].response))
                if length > 0:
                    active[index] = Text(prompt, length)
            if not active:
                continue
            with precision():
                likely = decoder.likeliest([*active.values()]).tolist()
            for (index, text), (_, token) in zip([*active.items()], likely, strict=True):
                text.ids.append(int(token))
                if len(text.ids) == text.most:
                    found[index] = text.ids[text.start :]
                    decoder.release(active.pop(index), keep=False)
    return found


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
