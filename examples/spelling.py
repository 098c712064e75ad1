"""A task: does the model spell words letter by letter? Scored by letters too, not only as a whole.

apt-eval runs/mine --plugin examples/spelling.py --tasks spelling
"""

from __future__ import annotations

import random
from pydoc_data.topics import topics
from typing import ClassVar

from apt_core import PluginInfo, ProviderSpec, hookimpl
from apt_core.providers import Question, QuestionTask

PLUGIN = PluginInfo(summary="spelling of words of Python's help", version="1.0.0")


class Spelling(QuestionTask):
    """``task:spelling``: questions drawn by the seed of the evaluation."""

    metrics: ClassVar = {"letters": "higher", "exact_match": "higher"}
    max_new_tokens = 24
    stop = ("\n",)

    def items(self):
        words = sorted({word for word in topics["assert"].lower().split() if word.isalpha()})
        random.Random(self.seed).shuffle(words)  # noqa: S311, draws are repeatable, not secret
        return [Question(f"{word}: ", " ".join(word)) for word in words[:20]]

    def score(self, item, text):
        said, wanted = text.split(), item.answer.split()
        right = sum(a == b for a, b in zip(said, wanted, strict=False))
        return {
            "letters": right / max(len(said), len(wanted)),
            "exact_match": float(said == wanted),
        }


@hookimpl
def apt_register_providers():
    return [ProviderSpec("task", "spelling", Spelling, version="1.0.0", summary=PLUGIN.summary)]
