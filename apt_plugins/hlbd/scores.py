"""Scores of tasks, by the levels from which and into which they turn a concept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from apt_core.data.sources.hlbd import task_of
from apt_core.data.store.parts import TokenPart
from apt_core.evaluation.responses import Pair, character_f1, pairs_of
from apt_core.providers.tokenizer import TokenizerProvider

Task = tuple[int, int]


@dataclass
class Score:
    """The sums over ``tasks``: of exact answers, and of the F1 of characters."""

    tasks: int = 0
    exact: int = 0
    f1: float = 0.0

    def add(self, exact: bool, f1: float) -> None:
        """Count one more."""
        self.tasks += 1
        self.exact += exact
        self.f1 += f1

    def row(self) -> dict[str, float]:
        """The means, as JSON."""
        return {
            "tasks": self.tasks,
            "exact_match": self.exact / self.tasks,
            "character_f1": self.f1 / self.tasks,
        }


@dataclass
class Scores:
    """The scores of one side of the split, together and by task."""

    together: Score = field(default_factory=Score)
    by_task: dict[Task, Score] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """All of them as JSON: ``by_task`` has keys such as ``2>5``."""
        if not self.together.tasks:
            return {"tasks": 0}
        by_task = {
            f"{source}>{target}": self.by_task[source, target].row()
            for source, target in sorted(self.by_task)
        }
        return {**self.together.row(), "by_task": by_task}

    def table(self) -> str:
        """The share of exact answers in percent, a row for each level that was given and a column
        for each that was asked for."""
        given = sorted({source for source, _ in self.by_task})
        asked = sorted({target for _, target in self.by_task})
        lines = ["given\\asked" + "".join(f"{level:>6}" for level in asked)]
        for source in given:
            cells = [self.by_task.get((source, target)) for target in asked]
            shown = [f"{100 * c.exact / c.tasks:6.1f}" if c else f"{'-':>6}" for c in cells]
            lines.append(f"{source:>11}" + "".join(shown))
        return "\n".join(lines)

    def __str__(self) -> str:
        score = self.together
        if not score.tasks:
            return "no tasks"
        return (
            f"{score.exact / score.tasks:.1%} of {score.tasks:,} answers exact, "
            f"F1 of characters {score.f1 / score.tasks:.1%}"
        )


def tasks_of(
    parts: Iterable[TokenPart], tokenizer: TokenizerProvider, most: int | None
) -> list[tuple[Task, Pair]]:
    """The tasks of ``parts``, each with the levels that it names: all, or ``most`` of them, drawn
    alike in each call (every n-th could be of few levels, which follow each other in turns)."""
    found = [
        (task, pair)
        for part in parts
        for pair in pairs_of(part)
        if (task := task_of(tokenizer.decode(pair.prompt))) is not None
    ]
    if most is None or most >= len(found):
        return found
    drawn = np.random.default_rng(0).permutation(len(found))[:most]
    return [found[index] for index in sorted(drawn)]


def scores_of(
    tasks: Sequence[tuple[Task, Pair]],
    answers: Sequence[Sequence[int]],
    tokenizer: TokenizerProvider,
) -> Scores:
    """The scores of ``answers``, which are compared as far as their end goes.

    An answer is exact if its ids are those of the response, including the end of the document
    where the tokenizer marks it.
    """
    scores, end = Scores(), tokenizer.special.eos

    def text(ids: Sequence[int]) -> str:
        ends = [place for place, token in enumerate(ids) if token == end]
        return tokenizer.decode(ids[: ends[0]] if ends else ids)

    for (task, pair), answer in zip(tasks, answers, strict=True):
        exact = list(answer[: len(pair.response)]) == list(pair.response)
        f1 = 1.0 if exact else character_f1(text(answer), text(pair.response))
        for score in (scores.together, scores.by_task.setdefault(task, Score())):
            score.add(exact, f1)
    return scores
