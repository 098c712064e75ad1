"""Compares what the run's model answers with what the export does.

Shapes: T tokens, V token ids, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from apt_plugins.export.own_answers import OwnAnswers, gap
from apt_plugins.export.questions import Questions
from apt_plugins.export.runtimes import ForeignAnswers

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Difference:
    """The largest difference between arrays: ``absolute``, and ``relative`` to the largest value of
    our own, at all but a share of the places."""

    absolute: float = 0.0
    relative: float = 0.0


class Differences:
    """Collects differences of arrays [T, …]; each place counts by its largest one."""

    def __init__(self, share: float = 1.0) -> None:
        self._share, self._absolute = share, 0.0
        self._relative: list[npt.NDArray[np.float64]] = []

    def add(
        self, own: npt.NDArray[np.float32], other: npt.NDArray[np.float32], least: float = 1e-9
    ) -> None:
        """Take the difference of ``other`` from ``own``, relative to the largest value of ``own``,
        or ``least`` where that is smaller; infinite where shapes differ or a value is not
        finite."""
        at = np.full(len(own), np.inf)
        if own.shape == other.shape and np.isfinite(other).all():
            at = np.abs(own.astype(np.float64) - other).reshape(len(own), -1).max(1, initial=0.0)
        self._absolute = max(self._absolute, float(at.max(initial=0.0)))
        self._relative.append(at / max(least, float(np.abs(own).max(initial=0.0))))

    @property
    def found(self) -> Difference:
        """The difference of all that were added."""
        places = np.concatenate(self._relative or [np.zeros(1)])
        # No mean of two places, of which one may be infinite.
        relative = float(np.quantile(places, self._share, method="lower"))
        return Difference(self._absolute, relative)


@dataclass
class Comparison:
    """What a comparison gave.

    ``logits`` at ``places``; ``blocks`` has the difference of the stream after each block, by
    number, empty where the runtime does not show it. Of ``tokens`` that were generated,
    ``equal_tokens`` are the same up to where texts part; ``ties`` texts part where two tokens are
    as likely as each other within the tolerance. With a ``share`` below 1, of places at which it
    holds, ``equal_tokens`` are those that are the most likely ones after what the export has
    generated before them. ``encoded`` texts and conversations were compared,
    and ``not_encoded`` are those that the runtime encodes in another way. ``faults`` are everything
    that speaks against the export.
    """

    tolerance: float
    share: float = 1.0
    logits: Difference = field(default_factory=Difference)
    places: int = 0
    blocks: dict[int, Difference] = field(default_factory=dict)
    prompts: int = 0
    tokens: int = 0
    equal_tokens: int = 0
    ties: int = 0
    encoded: int = 0
    not_encoded: list[str] = field(default_factory=list)
    ends_equal: bool | None = None
    faults: list[str] = field(default_factory=list)

    def first_block_that_differs(self) -> int | None:
        """The number of the first block after which the stream differs by more than the
        tolerance."""
        beyond = (n for n in sorted(self.blocks) if self.blocks[n].relative > self.tolerance)
        return next(beyond, None)


def compare(
    own: OwnAnswers,
    foreign: ForeignAnswers,
    questions: Questions,
    tolerance: float,
    tell: Callable[[str], None] = lambda what: None,
    *,
    share: float = 1.0,
) -> Comparison:
    """How the answers of the export differ from those of the run's model, which the ``tolerance``
    has to hold at a ``share`` of the places. ``tell`` is told what is being compared."""
    found = Comparison(tolerance, share)
    of_logits, of_blocks = Differences(share), dict[int, Differences]()
    for number, ids in enumerate(questions.prompts):
        tell(f"comparing prompt {number + 1} of {len(questions.prompts)}")
        logits, streams = own.forward(ids, whole=number in questions.whole)
        for way in foreign.ways():
            theirs = foreign.logits(number, way)
            of_logits.add(logits[-len(theirs) :].numpy(), theirs, least=1.0)
            found.places += len(theirs)
            for block, values in enumerate(streams):
                after = foreign.stream(number, block, way)
                if after is not None:
                    tell(f"comparing block {block + 1} of {len(streams)} at prompt {number + 1}")
                    of_blocks.setdefault(block, Differences(share)).add(values.numpy(), after)
    found.logits = of_logits.found
    found.blocks = {block: each.found for block, each in of_blocks.items()}
    if not found.logits.relative <= tolerance:
        found.faults.append(_of_logits(found))
    tell("comparing greedy texts")
    by_texts = own.generates and share == 1
    (_compare_texts if by_texts else _compare_choices)(own, foreign, questions, found)
    tell("comparing the tokenizer")
    _compare_tokenizers(own, foreign, questions, found)
    return found


def _of_logits(found: Comparison) -> str:
    text = (
        f"its logits differ by up to {found.logits.relative:.2g} of the largest one"
        f"{'' if found.share == 1 else f' at {found.share:.0%} of the places'}, and the tolerance "
        f"is {found.tolerance:g}"
    )
    if not found.blocks:
        return text
    block = found.first_block_that_differs()
    if block is None:
        return f"{text}; every block agrees, so that the final norm or the projection differs"
    return f"{text}; block {block} is the first that differs"


def _compare_texts(
    own: OwnAnswers, foreign: ForeignAnswers, questions: Questions, found: Comparison
) -> None:
    texts = own.greedy(questions.prompts, questions.new_tokens)
    found.prompts = sum(bool(count) for count in questions.new_tokens)
    for way, generated in foreign.ways().items():
        by = f" by {way}" if way else ""
        for number, (mine, theirs) in enumerate(zip(texts, generated, strict=True)):
            found.tokens += len(mine)
            same = _common(mine, theirs)
            found.equal_tokens += same
            if same == len(mine) == len(theirs):
                continue
            prompt = questions.prompts[number]
            if same < min(len(mine), len(theirs)):
                logits = own.forward([*prompt, *mine[:same]], whole=False)[0][-1]
                scale = max(1.0, float(torch.abs(logits).max()))
                if gap(logits, (mine[same], theirs[same])) <= 2 * found.tolerance * scale:
                    found.ties += 1
                    continue
            found.faults.append(
                f"the greedy text of prompt {number + 1}{by} parts at token {same + 1}, where no "
                "two tokens are as likely as each other"
            )


def _compare_choices(
    own: OwnAnswers, foreign: ForeignAnswers, questions: Questions, found: Comparison
) -> None:
    """Compare each token of the export's texts with the most likely one after those before it."""
    found.prompts, near = sum(bool(count) for count in questions.new_tokens), 0
    for way, generated in foreign.ways().items():
        by = f" by {way}" if way else ""
        for number, (prompt, text) in enumerate(zip(questions.prompts, generated, strict=True)):
            count = questions.new_tokens[number]
            found.tokens += count
            if len(text) != count:
                found.faults.append(
                    f"the greedy text of prompt {number + 1}{by} has {len(text)} of {count} tokens"
                )
            if not count or len(text) != count:
                continue
            logits = own.forward([*prompt, *text[:-1]])[0][len(prompt) - 1 :]
            gaps = logits.max(-1).values - logits.gather(-1, torch.tensor(text)[:, None])[:, 0]
            scale = logits.abs().max(-1).values.clamp_min(1.0)
            found.equal_tokens += int((gaps == 0).sum())
            near += int((gaps <= 2 * found.tolerance * scale).sum())
    if near < found.share * found.tokens:
        found.faults.append(
            f"{found.tokens - near:,} of {found.tokens:,} greedy tokens are not the most likely "
            "ones, nor as likely within the tolerance"
        )


def _common(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens are equal from the beginning on."""
    for number, (one, other) in enumerate(zip(mine, theirs, strict=False)):
        if one != other:
            return number
    return min(len(mine), len(theirs))


def _pairs(
    asked: Sequence[Item], answers: Sequence[Answer] | None
) -> Iterator[tuple[Item, Answer]]:
    """Each question with its answer; none where the runtime does not answer at all."""
    return zip(asked, answers, strict=True) if answers is not None else iter(())


def _compare_tokenizers(
    own: OwnAnswers, foreign: ForeignAnswers, questions: Questions, found: Comparison
) -> None:
    for text, ids in _pairs(questions.texts, foreign.text_ids):
        if ids is not None:
            found.encoded += 1
            if ids != own.encode(text):
                found.not_encoded.append(repr(text))
    for messages, ids in _pairs(questions.conversations, foreign.conversation_ids):
        found.encoded += 1
        if ids is None:
            found.not_encoded.append(f"a conversation of {len(messages)} messages")
        elif ids != own.encode_conversation(messages):
            found.not_encoded.append(f"the conversation that begins {messages[0].content!r}")
    if found.not_encoded:
        found.faults.append(
            f"its tokenizer encodes {len(found.not_encoded)} of {found.encoded} texts in another "
            f"way: {', '.join(found.not_encoded[:3])}"
        )
    if foreign.ends is None:
        return
    ends = set(foreign.ends)
    found.ends_equal = ends == set(own.ends())
    if foreign.few_ends:
        fine = own.main_ends() <= ends <= own.special() | own.main_ends()
    else:
        fine = found.ends_equal
    if not fine:
        found.faults.append(f"it ends texts at the ids {foreign.ends}, and the run at {own.ends()}")
