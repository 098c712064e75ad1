"""Providers of tokenizers (kind ``tokenizer``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from apt_core.providers.base import Provider
from apt_core.providers.documents import LEARNED_ROLE, ROLES, Document
from apt_core.sections import Count, Name, Section

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BETWEEN = "\n"
"""Stands between a prompt and its response."""

Segment = tuple[str | int, bool]
"""Text, or the id of a special token, and whether it is to be learned."""


class TokenizerSettings(Section):
    """``data.tokenizer``: settings of the tokenizer; each of them reads its own."""

    vocab_size: Annotated[int, Field(ge=264, le=2**24)] | None = Field(
        default=None,
        description="Of bpe: how many ids to make; without it, those of model.vocab_size.",
    )
    sample_chars: Count = Field(
        default=100_000_000, description="Of bpe and char: the characters of text to learn from."
    )
    sample_chars_per_document: Count = Field(
        default=20_000, description="Of bpe: the first characters of a document to learn from."
    )
    path: Name | None = Field(
        default=None, description="Of hf: a tokenizer.json, or a folder with one."
    )
    chat_template: Name | None = Field(
        default=None,
        description="A file with a Jinja chat template, in place of the tokenizer's own.",
    )


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that stand for no text: ``bos`` begins a document, ``eos`` ends it, ``pad`` fills; in
    a conversation one of ``roles`` begins a turn and ``end`` ends it. None where the tokenizer has
    none. ``ends`` are further ids that end what a model says. ``names`` has all special ids, for
    display.
    """

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    roles: Mapping[str, int] = field(default_factory=dict)
    end: int | None = None
    ends: tuple[int, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)


SPECIAL_NAMES = (
    "<|eos|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|end|>",
)


def special_tokens(ids: Sequence[int]) -> SpecialTokens:
    """The special tokens of the core's own tokenizers, whose ``ids`` are in the order of
    SPECIAL_NAMES. Their conversations are turns of ``<|role|>``, the content, ``<|end|>``."""
    by_name = dict(zip(SPECIAL_NAMES, ids, strict=True))
    return SpecialTokens(
        eos=by_name["<|eos|>"],
        pad=by_name["<|pad|>"],
        roles={role: by_name[f"<|{role}|>"] for role in ROLES},
        end=by_name["<|end|>"],
        names={token: name for name, token in by_name.items()},
    )


@dataclass(frozen=True)
class Encoded:
    """The ids of a document, 1-D, and which of them are to be learned: None for all."""

    ids: npt.NDArray[Any]
    learned: npt.NDArray[np.bool_] | None = None


class TokenizerProvider(Provider, ABC):
    """Turns text into ids and back; the provider is the tokenizer itself.

    ``decode(encode(text)) == text`` for every text. One that is ``trainable`` learns its vocabulary
    from the run's own text: :meth:`train` is called, or :meth:`load` with what :meth:`save` has
    kept, before anything else is asked.
    """

    trainable: ClassVar[bool] = False

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """How many ids there are, special ones included; they run from 0 to ``vocab_size - 1``."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of ``text``. Raises ValueError for lone surrogates, which are not text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special tokens leave nothing, and what is no valid text becomes
        U+FFFD. Never raises for valid ids."""

    def encode_array(self, text: str) -> npt.NDArray[Any]:
        """The ids of ``text`` as a 1-D array of the smallest unsigned type that holds them."""
        import numpy as np

        return np.array(self.encode(text), dtype=token_dtype(self.vocab_size))

    @property
    def special(self) -> SpecialTokens:
        """The tokenizer's special tokens; by default it has none."""
        return SpecialTokens()

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the template of conversations, in the form of Hugging Face."""
        return None

    def segments(self, document: Document) -> list[Segment]:
        """The texts and special tokens of ``document``, in order.

        All of a text is learned, with bos and eos where it begins and ends; of a prompt and
        response, the response and the eos after it; of a conversation, the contents of the
        assistant's turns and their ends. Raises ValueError for a conversation, where the tokenizer
        has no tokens for its turns.
        """
        special = self.special
        bos = special.bos if document.begins else None
        found: list[tuple[str | int | None, bool]] = [(bos, document.text is not None)]
        if document.text is not None:
            found += [(document.text, True), (special.eos if document.ends else None, True)]
        elif document.prompt is not None and document.response is not None:
            found += [(document.prompt + BETWEEN, False)]
            found += [(document.response, True), (special.eos, True)]
        else:
            for message in document.messages:
                learned = message.role == LEARNED_ROLE
                found += [(self._role(message.role), False)]
                found += [(message.content, learned), (special.end, learned)]
            found += [(special.eos, document.messages[-1].role == LEARNED_ROLE)]
        return [(each, learned) for each, learned in found if each is not None]

    def encode_document(self, document: Document) -> Encoded:
        """The ids of ``document``, by default those of its :meth:`segments`; raises what they
        do."""
        import numpy as np

        segments = self.segments(document)
        dtype = token_dtype(self.vocab_size)
        arrays = [
            np.array([each], dtype) if isinstance(each, int) else self.encode_array(each)
            for each, _ in segments
        ]
        ids = np.concatenate(arrays) if arrays else np.empty(0, dtype)
        if all(learned for _, learned in segments):
            return Encoded(ids)
        marks = [learned for _, learned in segments]
        return Encoded(ids, np.repeat(marks, [len(array) for array in arrays]))

    def encode_documents(self, documents: Sequence[Document]) -> list[Encoded]:
        """:meth:`encode_document` of each; a tokenizer that is faster on many at once overrides
        it."""
        return [self.encode_document(document) for document in documents]

    def encode_prompt(self, document: Document) -> list[int]:
        """The ids after which the model is to go on: a text without eos; a prompt up to its
        response; a conversation, whose last turn is not the assistant's, with the beginning of the
        assistant's. Raises what :meth:`segments` does."""
        if document.text is not None:
            document = replace(document, ends=False)
        segments = self.segments(document)
        if document.messages:
            segments = segments[: len(segments) - (self.special.eos is not None)]
            segments.append((self._role(LEARNED_ROLE), False))
        elif document.text is None:
            segments = [segment for segment in segments if not segment[1]]
        found: list[int] = []
        for each, _ in segments:
            found += [each] if isinstance(each, int) else self.encode(each)
        return found

    def _role(self, role: str) -> int:
        token = self.special.roles.get(role)
        if token is None:
            raise ValueError(
                f"the tokenizer {self.get_name()} has no token for turns of {role!r}, so that it "
                "cannot encode conversations"
            )
        return token

    def train(self, texts: Iterable[str]) -> None:
        """Learn the vocabulary from ``texts``. Only of those that are ``trainable``."""
        raise NotImplementedError(f"{self.get_name()} is not trainable")

    def save(self, folder: Path) -> None:
        """Write all that :meth:`load` needs into ``folder``, as JSON or text. The default has
        nothing to keep."""

    def load(self, folder: Path) -> None:
        """Take what :meth:`save` wrote, in place of training and of the files that the settings
        name. Raises OSError or ValueError for what is damaged."""

    def fingerprint(self) -> str | None:
        """A hash of everything that decides which ids a document has: the vocabulary's content,
        the special tokens, the template, every setting that matters, the code. None, the default,
        where that cannot be told.

        Two tokenizers with one fingerprint make the same ids of every document. Token stores are
        kept on disk under it and shared by later runs; without one each run tokenises its data
        anew. A name or a version is no fingerprint.
        """
        return None


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint8, uint16 and uint32 that holds ids below ``vocab_size``."""
    import numpy as np

    return np.dtype(
        np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32
    )
