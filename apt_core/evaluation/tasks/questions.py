"""Lets the model continue prompts, and the task judge what it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import cast

import numpy as np

from apt_core.data.store.input import naming
from apt_core.evaluation.found import Asking, Found
from apt_core.inference.decoding import dtype_for
from apt_core.inference.engine import Engine
from apt_core.providers.task import Question, QuestionTask, TaskProvider
from apt_core.providers.tokenizer import BETWEEN
from apt_core.runs.session import Session
from apt_core.types import GenerationRequest, Message

CHUNK_BATCHES = 8
"""So many batches of prompts are asked at a time: a short continuation makes room for the next."""


def score_questions(
    session: Session,
    task: TaskProvider,
    items: Sequence[Question],
    asking: Asking,
) -> Found | None:
    """What the task says of the continuations of each prompt, the mean of its samples. Of a prompt
    that is longer than the context, the model sees the end.

    The task judges when all is written: processes that share the model compute in step, whatever
    happens there.
    """
    asked = cast(QuestionTask, task)
    engine = Engine(session, max_batch=asking.batch_size)
    texts: list[list[str]] = []
    too_long, size = 0, max(1, CHUNK_BATCHES * asking.batch_size // asked.num_samples)
    for first in range(0, len(items), size):
        chunk = items[first : first + size]
        requests = [request for item in chunk for request in requests_of(asked, item)]
        results = iter(engine.run(requests, interrupted=asking.interrupted))
        if asking.interrupted():
            return None
        for _ in chunk:
            samples = [next(results) for _ in range(asked.num_samples)]
            too_long += any(sample.dropped_tokens for sample in samples)
            texts.append([sample.text for sample in samples])
        asking.advance(min(1.0, (first + size) / len(items)))
    with asking.judging(), naming("task", task, "score()"):
        values = [
            _mean([_judged(asked, item, text) for text in of_item])
            for item, of_item in zip(items, texts, strict=True)
        ]
    ones = np.ones(len(values))
    return Found(
        {n: np.stack([np.array([each[n] for each in values]), ones], axis=1) for n in task.metrics},
        str(dtype_for(session) or "float32").removeprefix("torch."),
        too_long=too_long,
    )


def _mean(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in scores) / len(scores) for name in scores[0]}


def requests_of(task: QuestionTask, item: Question) -> list[GenerationRequest]:
    """What is asked of the model for an item: a request for each sample, by seeds of its own."""
    prompt: str | tuple[Message, ...] = item.prompt
    if task.template == "chat":
        prompt = (Message("user", item.prompt),)
    elif task.template == "response":
        prompt = f"{item.prompt}{BETWEEN}"
    return [
        GenerationRequest(
            prompt,
            max_new_tokens=task.max_new_tokens,
            temperature=task.temperature,
            top_k=task.top_k,
            top_p=task.top_p,
            stop=tuple(task.stop),
            seed=task.seed + sample,
        )
        for sample in range(task.num_samples)
    ]


def _judged(task: QuestionTask, item: Question, text: str) -> dict[str, float]:
    """The metrics of a text. Raises ValueError for what are none."""
    found = task.score(item, text)
    if found.keys() != task.metrics.keys():
        raise ValueError(f"it gave {', '.join(found)}, and declares {', '.join(task.metrics)}")
    numbers = {name: float(value) for name, value in found.items()}
    if not all(map(isfinite, numbers.values())):
        raise ValueError(f"it gave numbers that are not finite: {numbers}")
    return numbers
