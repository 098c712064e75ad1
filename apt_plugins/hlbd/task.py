"""``task:hlbd``: the run's held-out HLBD tasks, as ``apt-eval`` and ``evaluation.tasks`` ask
them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from apt_core.data.sources.hlbd import task_of
from apt_core.evaluation.responses import character_f1
from apt_core.evaluation.validators import has_level_form
from apt_core.providers.task import Better, Question, QuestionTask


class HLBDTask(QuestionTask):
    """Turns levels of held-out concepts into others: exactly, by the F1 of characters, and in the
    form of the level that is asked for."""

    name = "hlbd"
    metrics: Mapping[str, Better] = {
        "exact_match": "higher",
        "character_f1": "higher",
        "level_form": "higher",
    }
    needs_held_out = True
    max_new_tokens = 128

    def items(self) -> Iterable[Question]:
        assert self.held_out is not None
        return [pair for pair in self.held_out.pairs() if task_of(pair.prompt) is not None]

    def fingerprint(self) -> str | None:
        assert self.held_out is not None
        return self.held_out.sha256

    def score(self, item: Question, text: str) -> dict[str, float]:
        levels = task_of(item.prompt)
        assert levels is not None
        return {
            "exact_match": float(text == item.answer),
            "character_f1": character_f1(text, item.answer),
            "level_form": has_level_form(text, levels[1]),
        }
