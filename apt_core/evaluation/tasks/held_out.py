"""Tasks of the run's own held-out documents, and of texts that are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from apt_core.evaluation.final_answers import final_answer
from apt_core.evaluation.validators import exact_match
from apt_core.providers.task import (
    EncodedPassage,
    Passage,
    PassageTask,
    Question,
    QuestionTask,
)


class HeldOutTask(PassageTask):
    """``task:held_out``: predicts the documents that the run has held out, each for itself, as they
    are learned: of a prompt with a response, the response."""

    name = "held_out"
    needs_held_out = True

    def items(self) -> Iterable[EncodedPassage]:
        assert self.held_out is not None
        return self.held_out.passages()

    def fingerprint(self) -> str | None:
        assert self.held_out is not None
        return self.held_out.sha256


class TextTask(PassageTask):
    """Predicts the texts that it is made of."""

    name = "text"

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__()
        self._texts = texts

    def items(self) -> Iterable[Passage]:
        return [Passage(text) for text in self._texts]


class ReasoningQuality(QuestionTask):
    """``task:reasoning_quality``: answers the held-out prompts, and compares the final answer with
    that of the response (:func:`~apt_core.evaluation.final_answers.final_answer`)."""

    name = "reasoning_quality"
    needs_held_out = True
    max_new_tokens = 256

    def items(self) -> Iterable[Question]:
        assert self.held_out is not None
        return self.held_out.pairs()

    def fingerprint(self) -> str | None:
        assert self.held_out is not None
        return self.held_out.sha256

    def score(self, item: Question, text: str) -> dict[str, float]:
        given, expected = (final_answer(each) for each in (text, item.answer))
        return {"exact_match": exact_match(given, expected, ("strip",))}
