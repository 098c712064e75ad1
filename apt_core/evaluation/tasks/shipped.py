"""The tasks that come with APT: files beside this one, and problems that are drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apt_core.evaluation.tasks.file import read_task
from apt_core.evaluation.validators import is_balanced, number_match
from apt_core.providers.task import Better, Question, QuestionTask, TaskProvider

NUM_ITEMS = 200


def completion(config: Any = None) -> TaskProvider:
    """``task:completion``: which of four words ends a sentence."""
    return read_task(Path(__file__).with_name("completion.yaml"))


def json_objects(config: Any = None) -> TaskProvider:
    """``task:json``: facts of a sentence as a JSON object."""
    return read_task(Path(__file__).with_name("json.yaml"))


class Arithmetic(QuestionTask):
    """``task:arithmetic``: sums, differences and products of numbers of one and two digits, made on
    the fly."""

    name = "arithmetic"
    metrics: Mapping[str, Better] = {"number_match": "higher"}
    max_new_tokens = 12
    stop = ("\n",)

    def items(self) -> Iterable[Question]:
        # A seed as text is hashed by sha512, alike in every version of Python.
        draw = random.Random(f"arithmetic {self.seed}")  # noqa: S311
        found = []
        for _ in range(NUM_ITEMS):
            high = draw.choice((9, 99))
            one, other = draw.randint(0, high), draw.randint(0, high)
            sign = draw.choice("+-*") if high == 9 else draw.choice("+-")
            result = {"+": one + other, "-": one - other, "*": one * other}[sign]
            found.append(Question(f"{one} {sign} {other} = ", str(result)))
        return found

    def score(self, item: Question, text: str) -> dict[str, float]:
        return {"number_match": number_match(text, item.answer)}


class Brackets(QuestionTask):
    """``task:brackets``: beginnings of rows of brackets, to be closed in the right order."""

    name = "brackets"
    metrics: Mapping[str, Better] = {"balanced": "higher"}
    max_new_tokens = 16
    stop = ("\n", " ")

    def items(self) -> Iterable[Question]:
        draw = random.Random(f"brackets {self.seed}")  # noqa: S311
        found = []
        for _ in range(NUM_ITEMS):
            opened: list[str] = []
            text = ""
            for _ in range(draw.randint(2, 10)):
                if opened and draw.random() < 0.4:
                    text += opened.pop()
                else:
                    pair = draw.choice(("()", "[]", "{}"))
                    text, opened = text + pair[0], [*opened, pair[1]]
            if not opened:
                text, opened = text + "(", [")"]
            found.append(Question(text, "".join(reversed(opened))))
        return found

    def score(self, item: Question, text: str) -> dict[str, float]:
        return {"balanced": is_balanced(item.prompt + text.strip())}
