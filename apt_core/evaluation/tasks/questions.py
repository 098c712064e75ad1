"""Lets the model continue prompts, and the task judge what it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import cast

import numpy as np

from apt_core.data.store.input import naming
from apt_core.evaluation.found import Found
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
    *,
    batch_size: int,
    stride: int | None,
    interrupted: Callable[[], bool],
    advance: Callable[[float], None],
) -> Found | None:
    """What the task says of the continuations of each prompt, the mean of its samples. Of a prompt
    that is longer than the context, the model sees the end."""
    asking = cast(QuestionTask, task)
    engine = Engine(session, max_batch=batch_size)
    values: dict[str, list[float]] = {name: [] for name in asking.metrics}
    too_long, size = 0, max(1, CHUNK_BATCHES * batch_size // asking.num_samples)
    for first in range(0, len(items), size):
        chunk = items[first : first + size]
        requests = [request for item in chunk for request in requests_of(asking, item)]
        results = iter(engine.run(requests, interrupted=interrupted))
        if interrupted():
            return None
        for item in chunk:
            samples = [next(results) for _ in range(asking.num_samples)]
            too_long += any(sample.dropped_tokens for sample in samples)
            judged = [_judged(asking, item, sample.text) for sample in samples]
            for name, found in values.items():
                found.append(sum(each[name] for each in judged) / len(judged))
        advance(min(1.0, (first + size) / len(items)))
    return Found(
        {name: np.stack([found, np.ones(len(found))], axis=1) for name, found in values.items()},
        str(dtype_for(session) or "float32").removeprefix("torch."),
        too_long=too_long,
    )


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


def _judged(task: QuestionTask, item: Question, text: str) -> Mapping[str, float]:
    with naming("task", task, "score()"):
        found = task.score(item, text)
        if found.keys() != task.metrics.keys():
            raise ValueError(f"it gave {', '.join(found)}, and declares {', '.join(task.metrics)}")
        numbers = {name: float(value) for name, value in found.items()}
        if not all(map(isfinite, numbers.values())):
            raise ValueError(f"it gave numbers that are not finite: {numbers}")
        return numbers
