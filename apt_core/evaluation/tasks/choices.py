"""Chooses among continuations of a prompt by their likelihood."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from apt_core.evaluation.found import Asking, Found
from apt_core.evaluation.likelihood import encode_pair, num_too_long, precision_of, predict
from apt_core.providers.task import Choice, TaskProvider
from apt_core.runs.session import Session

CHUNK_ITEMS = 256


def score_choices(
    session: Session,
    task: TaskProvider,
    items: Sequence[Choice],
    asking: Asking,
) -> Found | None:
    """Whether the answer is the likeliest choice, and whether it is so a byte; of equals the first
    is taken. What is longer than the context is seen from its end: the beginning of the prompt is
    left out."""
    right: list[float] = []
    right_per_byte: list[float] = []
    too_long = 0
    for first in range(0, len(items), CHUNK_ITEMS):
        chunk = items[first : first + CHUNK_ITEMS]
        stretches = [
            encode_pair(session.tokenizer, item.prompt, choice, task.template)
            for item in chunk
            for choice in item.choices
        ]
        predicted = predict(
            session,
            stretches,
            stride=asking.stride,
            batch_size=asking.batch_size,
            interrupted=asking.interrupted,
        )
        if predicted is None:
            return None
        sums, asked = iter(-each.losses.sum() for each in predicted), iter(stretches)
        for item in chunk:
            own = [next(asked) for _ in item.choices]
            too_long += num_too_long(own, session.config.model.max_seq_len) > 0
            likelihoods = np.array([next(sums) for _ in item.choices])
            sizes = np.array([max(1, len(choice.encode("utf-8"))) for choice in item.choices])
            right.append(float(likelihoods.argmax() == item.answer))
            right_per_byte.append(float((likelihoods / sizes).argmax() == item.answer))
        asking.advance(min(1.0, (first + CHUNK_ITEMS) / len(items)))
    return Found(
        {
            name: np.stack([np.array(values), np.ones(len(values))], axis=1)
            for name, values in (("accuracy", right), ("accuracy_per_byte", right_per_byte))
        },
        precision_of(session),
        too_long=too_long,
    )
