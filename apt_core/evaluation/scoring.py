"""Scores a model on tasks: from a task's items to figures with intervals."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from apt_core.data.store.input import naming
from apt_core.errors import ConfigError, ProviderError
from apt_core.evaluation.found import Asking, Found
from apt_core.evaluation.metrics import Figure, figure_of
from apt_core.evaluation.tasks.choices import score_choices
from apt_core.evaluation.tasks.passages import score_passages
from apt_core.evaluation.tasks.questions import score_questions
from apt_core.providers.task import (
    Choice,
    ChoiceTask,
    EncodedPassage,
    HeldOutText,
    Passage,
    PassageTask,
    Question,
    QuestionTask,
    TaskProvider,
    prompt_ids,
)
from apt_core.providers.tokenizer import TokenizerProvider
from apt_core.runs.session import Session


@dataclass(frozen=True)
class Scoring:
    """What scores depend on beside model and task: the ``batch_size`` of forwards, the ``stride``
    of windows (None: half of the context), the ``seed`` of what tasks draw, and how many items are
    looked at, spread evenly over all (``limit``; None: all)."""

    batch_size: int = 16
    stride: int | None = None
    seed: int = 0
    limit: int | None = None

    def asking(self, advance: Callable[[float], None] = lambda share: None) -> Asking:
        """How items are asked by it."""
        return Asking(self.batch_size, self.stride, advance=advance)


@dataclass(frozen=True, eq=False)
class Items:
    """The ``chosen`` items of ``task``, of ``total``; ``sha256`` is that of the task: of all its
    items and of how they are asked."""

    name: str
    task: TaskProvider
    chosen: Sequence[Any]
    total: int
    sha256: str


@dataclass(frozen=True, eq=False)
class TaskScore:
    """The ``figures`` of ``items`` by metric."""

    items: Items
    found: Found
    figures: Mapping[str, Figure]
    seconds: float = 0.0


KINDS: tuple[tuple[type[TaskProvider], tuple[type, ...], Callable[..., Found | None]], ...] = (
    (PassageTask, (Passage, EncodedPassage), score_passages),
    (ChoiceTask, (Choice,), score_choices),
    (QuestionTask, (Question,), score_questions),
)
"""The kinds of tasks, each with its items and with what scores these."""


def items_of(
    name: str,
    task: TaskProvider,
    scoring: Scoring,
    held_out: HeldOutText | None = None,
    key: str = "--tasks",
) -> Items:
    """The items of a task, once it was told the seed and the held-out text; ``key`` is what asks
    for it.

    Raises ConfigError for a task without items, ProviderError for one that fails or has items of
    another kind.
    """
    if task.needs_held_out and held_out is None:
        raise ConfigError(f"the task {name} needs the data of a run", key)
    task.seed, task.held_out = scoring.seed, held_out
    with naming("task", task, "items()"):
        items = task.items()
        items = items if isinstance(items, Sequence) else list(items)
    if not items:
        what = "the run's held-out documents have none" if task.needs_held_out else ""
        raise ConfigError(f"the task {name} has no items", key, hint=what)
    limit = min(len(items), scoring.limit or len(items))
    chosen = [items[index * len(items) // limit] for index in range(limit)]
    _, kinds, _ = _kind_of(name, task)
    wrong = next((each for each in chosen if not isinstance(each, kinds)), None)
    if wrong is not None:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ProviderError(f"task:{name}: an item is a {type(wrong).__name__}, not a {expected}")
    return Items(name, task, chosen, len(items), _sha256(task, items))


def check_template(items: Items, tokenizer: TokenizerProvider, key: str = "--tasks") -> None:
    """Raise ConfigError for a task whose prompts the tokenizer cannot encode."""
    try:
        prompt_ids(tokenizer, "", items.task.template)
    except ValueError as error:
        raise ConfigError(f"the task {items.name}: {error}", key) from None


def find(session: Session, items: Items, asking: Asking) -> Found | None:
    """What the model of ``session`` makes of the chosen items; None once it was interrupted. Raises
    ProviderError for a task that fails."""
    _, _, score_items = _kind_of(items.name, items.task)
    return score_items(session, items.task, items.chosen, asking)


def score(session: Session, items: Items, asking: Asking) -> TaskScore | None:
    """The score of the model of ``session`` on these items; None and errors as of :func:`find`."""
    began = time.monotonic()
    found = find(session, items, asking)
    if found is None:
        return None
    figures = {name: figure_of(name, sums) for name, sums in found.sums.items()}
    return TaskScore(items, found, figures, time.monotonic() - began)


def _kind_of(
    name: str, task: TaskProvider
) -> tuple[type[TaskProvider], tuple[type, ...], Callable[..., Found | None]]:
    for kind in KINDS:
        if isinstance(task, kind[0]):
            return kind
    names = ", ".join(kind.__name__ for kind, _, _ in KINDS)
    raise ProviderError(f"task:{name}: {type(task).__name__} derives from none of {names}")


def _sha256(task: TaskProvider, items: Sequence[Any]) -> str:
    own = task.fingerprint()
    digest = hashlib.sha256(json.dumps(task.asked(), sort_keys=True, default=str).encode())
    if own is not None:
        digest.update(own.encode())
        return digest.hexdigest()
    for item in items:
        text = json.dumps([type(item).__name__, asdict(item)], sort_keys=True)
        digest.update(text.encode())
    return digest.hexdigest()
