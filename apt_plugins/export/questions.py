"""What a certificate asks of the run's model and of the export: prompts, texts, conversations."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Literal
from unicodedata import normalize

from apt_core.inference.chat import FORMATS, ChatFormat, encoded
from apt_core.providers import PlainShape, TokenizerProvider
from apt_core.providers.documents import Message

NUM_PROMPTS = 20
NEW_TOKENS = 200
LENGTHS = (1, 2, 3, 7, 16, 40, 100, 256)
"""Of prompts, by turns, as far as the context has them."""

RANDOM_PROMPTS = 4
"""Prompts of random ids, which no text has."""

LONGEST = 2048
"""The most tokens of the one prompt that fills the context."""

MAX_VALUES = 1 << 26
"""Logits and values of streams that are compared at most; beyond them, of the last places alone."""

TEXTS = (
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    " leading space",
    "trailing space ",
    "two  spaces,   three spaces",
    "a\nb\n\nc\r\nd\te",
    "\n",
    " ",
    "1234567890 3.14159 1,000,000 0x1F 2026-11-30",
    "don't can't I'll you're we've it's",
    "def f(x):\n    return x ** 2  # squared\n",
    '{"key": [1, 2.5, null], "other": "value\\n"}',
    "https://example.org/path?query=1&other=two#part",
    "snake_case camelCase CONSTANT_NAME kebab-case",
    "!!! ??? ... --- *** ((( )))",
    "naïve café Ünïcödé Straße ÆØÅ",
    "Привет, мир! Как дела?",
    "你好，世界。这是一个测试。",
    "こんにちは世界。カタカナと漢字。",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "e\u0301 n\u0303 o\u0308 \u1e9b\u0323",
    "\ufb01 ligature \u2126 ohm \u00bd half \u2460 circled",
    "zero\u200bwidth \u00a0nbsp \u3000ideographic \u2028line",
    "\u0000\u0001\u007f control",
    "x = ∑ᵢ αᵢ·βᵢ ≤ ∞ → ∅",
    "Mixed 中文 and English, 日本語 and 123 numbers ４５６.",
)
"""Where tokenizers differ from each other: white space, digits, scripts, marks that combine."""

MAX_PIECES = 1 << 16
"""Tokens whose texts are encoded at most."""

CONVERSATIONS = (
    (Message("user", "What is the capital of France?"),),
    (
        Message("system", "You are terse."),
        Message("user", "  Say hello\nin two languages. "),
        Message("assistant", "Hello. 你好。"),
        Message("user", "And in a third?"),
    ),
)


@dataclass(frozen=True)
class Questions:
    """``prompts`` as token ids, of which the model's logits are compared, at all places of those
    numbered in ``whole``, and the ``new_tokens`` most likely tokens after each; ``texts`` and
    ``conversations`` to encode. ``held_out`` counts the prompts that are of held-out text."""

    prompts: tuple[tuple[int, ...], ...]
    whole: tuple[int, ...]
    new_tokens: tuple[int, ...]
    texts: tuple[str, ...] = ()
    conversations: tuple[tuple[Message, ...], ...] = ()
    held_out: int = 0

    def normalized(self, form: Literal["NFC", "NFD", "NFKC", "NFKD"]) -> Questions:
        """These questions with texts and conversations in a normal form of Unicode."""
        return replace(
            self,
            texts=tuple(normalize(form, text) for text in self.texts),
            conversations=tuple(
                tuple(replace(each, content=normalize(form, each.content)) for each in messages)
                for messages in self.conversations
            ),
        )


def questions_for(
    shape: PlainShape,
    tokenizer: TokenizerProvider,
    held_out: Sequence[Sequence[int]] = (),
    chat_format: ChatFormat = FORMATS["template"],
    *,
    num_prompts: int = NUM_PROMPTS,
    new_tokens: int = NEW_TOKENS,
) -> Questions:
    """The questions for a model of this shape: prompts of ``held_out`` texts, given as ids, of
    texts of our own where there are none, and of random ids; the same ones each time. Of the
    conversations those that ``chat_format`` has a prompt for."""
    context = shape.max_seq_len
    longest = max(1, context - new_tokens if context > 2 * new_tokens else context // 2)
    lengths = [min(length, longest) for length in islice(cycle(LENGTHS), num_prompts)]
    own = [ids for ids in map(tokenizer.encode, TEXTS) if ids]
    texts = [list(ids) for ids in held_out if len(ids) > 1]
    counted = len(texts)
    texts = texts or own
    draw = random.Random(0)  # noqa: S311
    prompts = []
    of_held_out = 0
    for number, length in enumerate(lengths):
        if number >= num_prompts - RANDOM_PROMPTS:
            prompts.append([draw.randrange(shape.vocab_size) for _ in range(length)])
            continue
        prompts.append(_stretch(texts, number, length))
        of_held_out += bool(counted)
    prompts.append(_stretch(texts, 0, min(context, LONGEST)))
    counts = [max(0, min(new_tokens, context - length)) for length in lengths]
    return Questions(
        tuple(map(tuple, prompts)),
        _whole([len(prompt) for prompt in prompts], shape),
        (*counts, 0),
        (*TEXTS, *_pieces(tokenizer)),
        tuple(each for each in CONVERSATIONS if _is_encoded(tokenizer, chat_format, each)),
        of_held_out,
    )


def _pieces(tokenizer: TokenizerProvider) -> Iterator[str]:
    """The texts of tokens, those of the first MAX_PIECES, which are encoded otherwise where a merge
    is missing that no other text needs."""
    special = tokenizer.special.names
    ids = [token for token in range(tokenizer.vocab_size) if token not in special]
    texts = (tokenizer.decode([token]) for token in ids[:MAX_PIECES])
    return (text for text in dict.fromkeys(texts) if text and "\ufffd" not in text)


def _stretch(texts: Sequence[Sequence[int]], first: int, length: int) -> list[int]:
    """``length`` ids from text number ``first`` on, and of those after it."""
    found: list[int] = []
    for text in islice(cycle(texts), first, None):
        found += text
        if len(found) >= length:
            return found[:length]
    return found


def _whole(lengths: Sequence[int], shape: PlainShape) -> tuple[int, ...]:
    """The numbers of the prompts that are compared at all places: as many as MAX_VALUES has room
    for, short ones first, but in any case one with two places, if there is one."""
    values = shape.vocab_size + shape.d_model * shape.num_layers
    found: list[int] = []
    room = MAX_VALUES
    for number in sorted(range(len(lengths)), key=lambda each: lengths[each]):
        room -= lengths[number] * values
        if room < 0 and any(lengths[each] > 1 for each in found):
            break
        found.append(number)
    return tuple(sorted(found))


def _is_encoded(
    tokenizer: TokenizerProvider, chat_format: ChatFormat, messages: tuple[Message, ...]
) -> bool:
    """Whether the tokenizer encodes this conversation; a template may refuse a system message."""
    try:
        encoded(tokenizer, chat_format.render(messages))
    except ValueError:
        return False
    return True
