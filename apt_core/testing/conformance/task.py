"""What every task must do."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.providers.task import (
    Choice,
    ChoiceTask,
    EncodedPassage,
    Passage,
    PassageTask,
    Question,
    QuestionTask,
)
from apt_core.testing.conformance.checks import Check, LeftOut

KINDS: tuple[tuple[type, tuple[type, ...]], ...] = (
    (PassageTask, (Passage, EncodedPassage)),
    (ChoiceTask, (Choice,)),
    (QuestionTask, (Question,)),
)

TEXTS = ("", "no", "42", "\n\n", "{}", "火 \x00 😀")


class _HeldOut:
    """The held-out text that a task is given: one document, and one pair."""

    tokenizer = ByteTokenizer()
    sha256 = "0" * 64

    def passages(self) -> Sequence[EncodedPassage]:
        return [EncodedPassage((97, 98), None, 2)]

    def pairs(self) -> Sequence[Question]:
        return [Question("1 and 1 make\n", "2")]


def task_checks(provider: Any) -> list[Check]:
    """The checks of a task."""
    return [
        Check("builds", lambda: _builds(provider)),
        Check("items", lambda: _items(provider)),
        Check("seed", lambda: _seed(provider)),
        Check("metrics", lambda: _metrics(provider)),
    ]


def _asked(task: Any, seed: int) -> list[Any]:
    task.seed, task.held_out = seed, _HeldOut()
    return list(task.items())


def _kind(task: Any) -> tuple[type, tuple[type, ...]]:
    for kind in KINDS:
        if isinstance(task, kind[0]):
            return kind
    names = ", ".join(kind.__name__ for kind, _ in KINDS)
    raise AssertionError(f"a {type(task).__name__} derives from none of {names}")


def _builds(task: Any) -> None:
    _kind(task)


def _items(task: Any) -> None:
    """There are some, of the kind of the task."""
    items, kinds = _asked(task, 0), _kind(task)[1]
    if not items and task.needs_held_out:
        raise LeftOut("it makes no item of the documents of this check")
    assert items, "it has no items"
    wrong = [item for item in items if not isinstance(item, kinds)]
    assert not wrong, f"an item is a {type(wrong[0]).__name__}, not one of {kinds}"
    for item in items:
        if isinstance(item, Choice):
            assert 0 <= item.answer < len(item.choices), f"{item} has no such answer"


def _seed(task: Any) -> None:
    """The same seed gives the same items, whatever was asked before."""
    first, _, again = (_asked(task, seed) for seed in (1, 2, 1))
    assert first == again, "the same seed gives other items"


def _metrics(task: Any) -> None:
    """Each is higher or lower; a score has all of them, and no other, as finite numbers."""
    assert task.metrics, "it has no metrics"
    for name, better in task.metrics.items():
        assert better in ("higher", "lower"), f"{name} is {better!r}: say higher or lower"
    if not isinstance(task, QuestionTask):
        kind: Any = _kind(task)[0]
        assert task.metrics.keys() == kind.metrics.keys(), f"metrics are {[*kind.metrics]}"
        return
    for item in _asked(task, 0)[:20]:
        for text in (*TEXTS, item.answer):
            found = task.score(item, text)
            assert found.keys() == task.metrics.keys(), (
                f"score gives {[*found]}, and metrics are {[*task.metrics]}"
            )
            assert all(isfinite(value) for value in found.values()), f"{found} is not finite"
