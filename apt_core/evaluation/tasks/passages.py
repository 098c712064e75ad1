"""Predicts texts: perplexity a token, bits per byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from apt_core.evaluation.found import Asking, Found
from apt_core.evaluation.intervals import Sums
from apt_core.evaluation.likelihood import (
    Stretch,
    after_beginning,
    default_stride,
    encode_text,
    num_too_long,
    precision_of,
    predict,
)
from apt_core.providers.task import EncodedPassage, Passage, TaskProvider
from apt_core.runs.session import Session

CHUNK_TOKENS = 1 << 20
"""The tokens of texts that are held in memory at a time."""


def score_passages(
    session: Session,
    task: TaskProvider,
    items: Sequence[Passage | EncodedPassage],
    asking: Asking,
) -> Found | None:
    """The losses of ``items`` with their tokens and bytes, by document; of a single document by
    windows of ``stride`` tokens, to each of which belong as many of its bytes as of its tokens."""
    context = session.config.model.max_seq_len
    stride = asking.stride or default_stride(context)
    tokens: list[Sums] = []
    sizes: list[Sums] = []
    done = too_long = 0

    def advance_chunk(share: float) -> None:
        asking.advance((done + share * len(chunk)) / len(items))

    for chunk in _chunks(session, items):
        stretches = [stretch for stretch, _, _ in chunk]
        predicted = predict(
            session,
            stretches,
            stride=stride,
            batch_size=asking.batch_size,
            interrupted=asking.interrupted,
            advance=advance_chunk,
        )
        if predicted is None:
            return None
        too_long += num_too_long(stretches, context)
        for (_, learned, num_bytes), of in zip(chunk, predicted, strict=True):
            losses = of.losses if learned is None else of.losses * learned
            counts = np.ones(len(losses)) if learned is None else learned.astype(np.float64)
            if len(items) == 1 and len(losses):
                starts = np.arange(0, len(losses), stride)
                losses, counts = np.add.reduceat(losses, starts), np.add.reduceat(counts, starts)
            else:
                losses, counts = losses.sum(keepdims=True), counts.sum(keepdims=True)
            share = counts / max(1.0, counts.sum())
            tokens.append(np.stack([losses, counts], axis=1))
            sizes.append(np.stack([losses, num_bytes * share], axis=1))
        done += len(chunk)
    sums = {"bits_per_byte": np.concatenate(sizes), "perplexity": np.concatenate(tokens)}
    return Found(
        sums, precision_of(session), "documents" if len(items) > 1 else "windows", too_long
    )


def _chunks(
    session: Session, items: Sequence[Passage | EncodedPassage]
) -> Iterator[list[tuple[Stretch, np.ndarray | None, int]]]:
    """The items in turn, as what is predicted, which of it counts (None: all), and its bytes."""
    found: list[tuple[Stretch, np.ndarray | None, int]] = []
    size = 0
    for item in items:
        if isinstance(item, Passage):
            stretch = encode_text(session.tokenizer, item.text)
            found.append((stretch, None, len(item.text.encode("utf-8"))))
        else:
            stretch = after_beginning(session.tokenizer, item.ids)
            learned = None
            if item.learned is not None:
                learned = np.asarray(item.learned, dtype=bool)
                learned = learned[len(item.ids) + 1 - len(stretch.ids) :]  # without a bos
            found.append((stretch, learned, item.num_bytes))
        size += len(stretch.ids)
        if size >= CHUNK_TOKENS:
            yield found
            found, size = [], 0
    if found:
        yield found
