"""Providers of tasks that a model is scored on (kind ``task``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from apt_core.providers.base import Provider
from apt_core.providers.documents import Document

if TYPE_CHECKING:
    from apt_core.providers.tokenizer import TokenizerProvider

Better = Literal["higher", "lower"]
"""Which of two values of a metric is the better one."""

Template = Literal["text", "response", "chat"]
"""How a prompt is given to the model: as it is; as a prompt that a response follows, which pairs
are trained as; or as the turn of a user, by the tokenizer's template."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A text that is predicted from its first token to its last."""

    text: str


@dataclass(frozen=True, slots=True)
class EncodedPassage:
    """A document as ids, of which those that are ``learned`` are predicted, None for all;
    ``num_bytes`` are the UTF-8 bytes of these."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...] | None
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """A prompt and its possible continuations, of which the one numbered ``answer`` is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt that the model continues, and what the right continuation is, where there is one."""

    prompt: str
    answer: str = ""


class HeldOutText(Protocol):
    """The held-out documents of a run, for tasks that are made of them."""

    @property
    def tokenizer(self) -> TokenizerProvider: ...

    @property
    def sha256(self) -> str:
        """The hash of the documents."""

    def passages(self) -> Sequence[EncodedPassage]:
        """Every document, each read when it is asked for."""

    def pairs(self) -> Sequence[Question]:
        """Those that are a prompt and a response, likewise."""


class TaskProvider(Provider, ABC):
    """Items that a model is scored on, and what is measured.

    ``metrics`` has every metric by name, with what is better; the first is the main one. ``seed``
    and ``held_out`` are set before :meth:`items` is called: what a task draws, it draws by the
    seed; ``held_out`` is None where nobody has a run's data. A task derives from one of
    :class:`PassageTask`, :class:`ChoiceTask` and :class:`QuestionTask`.
    """

    metrics: Mapping[str, Better] = {}
    template: Template = "text"
    needs_held_out: ClassVar[bool] = False
    seed: int = 0
    held_out: HeldOutText | None = None

    @abstractmethod
    def items(self) -> Iterable[object]:
        """The items, always the same for one seed; of a sequence only those that are looked at are
        read. Raises ConfigError for bad input."""

    def fingerprint(self) -> str | None:
        """A hash that tells the items apart from others, where it is cheaper than a hash of all of
        them, which is what None, the default, asks for."""
        return None

    def asked(self) -> dict[str, Any]:
        """How items are asked, as JSON: a part of what scores depend on."""
        return {"template": self.template, "seed": self.seed}


class PassageTask(TaskProvider):
    """Texts that are predicted: by ``perplexity`` a token, and ``bits_per_byte`` of UTF-8."""

    metrics: Mapping[str, Better] = {"bits_per_byte": "lower", "perplexity": "lower"}

    @abstractmethod
    def items(self) -> Iterable[Passage | EncodedPassage]: ...


class ChoiceTask(TaskProvider):
    """Choices by likelihood: ``accuracy`` takes the most likely choice as the answer,
    ``accuracy_per_byte`` the one of the highest log-likelihood a byte of UTF-8."""

    metrics: Mapping[str, Better] = {"accuracy": "higher", "accuracy_per_byte": "higher"}

    @abstractmethod
    def items(self) -> Iterable[Choice]: ...


class QuestionTask(TaskProvider):
    """Prompts that the model continues; :meth:`score` judges what it writes.

    ``max_new_tokens``, ``temperature``, ``top_k``, ``top_p`` and ``stop`` are those of a
    :class:`~apt_core.GenerationRequest`. ``num_samples`` are drawn of each prompt and their scores
    averaged; one is enough at temperature 0.
    """

    metrics: Mapping[str, Better] = {"exact_match": "higher"}
    max_new_tokens: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    num_samples: int = 1

    @abstractmethod
    def items(self) -> Iterable[Question]: ...

    def asked(self) -> dict[str, Any]:
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "stop", "num_samples")
        return {**super().asked(), **{name: getattr(self, name) for name in names}}

    def score(self, item: Question, text: str) -> Mapping[str, float]:
        """The metrics of ``text``, what the model wrote after the prompt of ``item``: a number for
        each of ``metrics``. By default it has to be the answer, but for spaces around it."""
        return {"exact_match": float(text.strip() == item.answer.strip())}


def prompt_ids(tokenizer: TokenizerProvider, prompt: str, template: Template) -> list[int]:
    """The ids of ``prompt`` by ``template``. Raises ValueError where the tokenizer has no turns."""
    return tokenizer.encode_prompt(prompt_document(prompt, template))


def prompt_document(prompt: str, template: Template) -> Document:
    """The document that ``prompt`` begins."""
    if template == "chat":
        return Document.of({"messages": [{"role": "user", "content": prompt}]})
    if template == "response":
        return Document(prompt=prompt, response="")
    return Document(text=prompt)
