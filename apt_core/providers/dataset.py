"""Sources of documents (kind ``dataset``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from apt_core.kinds import KINDS
from apt_core.providers.base import Provider
from apt_core.providers.documents import Document
from apt_core.providers.tokenizer import TokenizerSettings
from apt_core.sections import Count, Fraction, Name, Section, Size, one_of


def _paths(value: Any) -> Any:
    """Says of both forms at once what is wrong; pydantic tells of each alone."""
    if isinstance(value, list | tuple):
        if not value:
            raise PydanticCustomError("too_short", "must not be empty")
        if not all(isinstance(item, str) for item in value):
            raise PydanticCustomError("paths", "must be a path, or a list of paths that are text")
    elif not isinstance(value, str):
        raise PydanticCustomError("apt_paths", "must be a path or a list of paths")
    return value


Paths = Annotated[Name | list[Name], BeforeValidator(_paths)]
"""Files, folders, patterns and URLs: one, or several."""

Record = Document | str | Mapping[str, Any]
"""What a source may yield; :meth:`Document.of` reads it."""


PLAIN_SOURCES = ("pydoc", "python_source")
PLAIN_FILES = (".txt", ".text", ".md", ".rst", ".py")
"""Sources of the core, and suffixes of files, that have texts alone and no records."""


class Columns(Section):
    """``data.columns``: the names under which records hold the fields of a document."""

    text: Name = Field(default="text", description="A text.")
    prompt: Name = Field(default="prompt", description="A prompt, of which nothing is learned.")
    response: Name = Field(default="response", description="The response to it.")
    messages: Name = Field(
        default="messages", description="A conversation: a list of {role, content}."
    )
    key: Name | None = Field(
        default=None,
        description="Records of one value stand on one side of the split; without it, each record "
        "for itself.",
    )


class SourceSection(Section):
    """Where documents come from: the keys that ``data`` and each item of its mixture have."""

    source: Name | None = Field(
        default=None,
        description="Built-in data, such as pydoc. Without it the loader reads; where that is the "
        "default one and has no train_path, the text is pydoc.",
    )
    train_path: Paths | None = Field(
        default=None, description="What to train on: a file, folder, pattern or URL, or several."
    )
    val_path: Paths | None = Field(
        default=None, description="What to evaluate on; without it val_fraction is held out."
    )
    loader: Name = Field(
        KINDS["dataset"].default,
        description="Provider that reads train_path; any but text_default is used without one too.",
    )
    columns: Columns = Field(default_factory=Columns, description="The names of fields in records.")
    errors: Literal["strict", "replace"] = Field(
        default="strict",
        description="Bytes that are no UTF-8: an error, or replaced by U+FFFD and counted.",
    )

    @property
    def text_source(self) -> str | None:
        """The built-in data to train on, or None where the loader reads instead."""
        asked = self.train_path or self.loader != KINDS["dataset"].default
        return self.source or (None if asked else "pydoc")

    @property
    def dataset_name(self) -> str:
        """The provider of the documents."""
        return self.text_source or self.loader

    @property
    def has_records(self) -> bool:
        """Whether anything that is read may be records with columns: not the core's built-in texts,
        and not files whose names say that they are plain text."""
        if self.dataset_name not in (*PLAIN_SOURCES, KINDS["dataset"].default):
            return True
        paths: list[str] = []
        for value in (self.train_path, self.val_path):
            paths += [value] if isinstance(value, str) else value or []
        names = [path.lower().removesuffix(".gz").removesuffix(".zst") for path in paths]
        return not all(name.endswith(PLAIN_FILES) for name in names)


class MixtureItem(SourceSection):
    """An item of ``data.mixture``: a source of its own with its weight."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")] = Field(
        description="Names it in schedules (mixture_NAME, enable_NAME_at_step) and in figures."
    )
    weight: Annotated[float, Field(ge=0.0, le=1e6)] = Field(
        default=1.0, description="Its share of the windows, relative to the other weights."
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of its loader, where those have a section of their own.",
    )


def mixture_param(name: str) -> str:
    """The scheduled parameter that is the weight of the source ``name`` of a mixture."""
    return f"mixture_{name}"


class DataSection(SourceSection):
    """``data``: where the text comes from and how it becomes tokens."""

    mixture: list[MixtureItem] | None = Field(
        default=None, description="Several sources with weights, in place of one."
    )
    tokenizer_name: Name = Field(
        KINDS["tokenizer"].default, description="Provider of the tokenizer."
    )
    tokenizer: TokenizerSettings = Field(
        default_factory=TokenizerSettings, description="Settings of the tokenizer."
    )
    normalize: Literal["none", "NFC", "NFKC"] = Field(
        default="none", description="The Unicode normal form into which texts are brought."
    )
    min_chars: Count = Field(default=1, description="Shorter documents are left out.")
    max_chars: Count | None = Field(default=None, description="Longer documents are left out.")
    deduplicate: Literal["none", "exact", "near"] = Field(
        default="none",
        description="Leave out documents that repeat another one exactly, or nearly (MinHash).",
    )
    near_threshold: Fraction = Field(
        default=0.8, description="The Jaccard similarity from which on documents repeat nearly."
    )
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.1, description="The share of documents that is held out, chosen by their hash."
    )
    max_val_chars: Count | None = Field(
        default=2_000_000,
        description="The most characters that are held out of a source; the rest of the share is "
        "trained on. null holds out the whole share.",
    )
    max_length: Size | None = Field(
        default=None, description="Tokens per training sequence; without it, model.max_seq_len."
    )
    packing: Literal["concat", "documents", "pad"] | None = Field(
        default=None,
        description="How documents fill sequences: one after the other (concat), whole ones beside "
        "each other that do not see each other (documents), or one a sequence (pad). Without it: "
        "pad where padding asks for it, documents for prompts and conversations, else concat.",
    )
    truncation: bool | None = Field(
        default=None,
        description="With packing pad: cut what is longer than a sequence; otherwise the rest "
        "fills further sequences.",
    )
    padding: (
        Annotated[
            Literal[True, False, "max_length", "longest", "do_not_pad"],
            one_of(True, False, "max_length", "longest", "do_not_pad"),
        ]
        | None
    ) = Field(
        default=None,
        description="With packing pad: fill sequences to max_length, or to the longest of their "
        "batch (longest, true).",
    )
    num_workers: Annotated[int, Field(ge=0, le=64)] = Field(
        default=0, description="Threads that make batches ahead of the step that takes them."
    )
    begin_early: bool = Field(
        default=False,
        description="Begin to train on the first shards while the others are still being built. It "
        "needs training.max_steps and packing concat, and goes without a mixture.",
    )
    build_workers: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None, description="Processes that tokenise; without it, one a core."
    )

    def sections(self) -> list[tuple[str, SourceSection]]:
        """The sections that name sources, each with its key: the items of the mixture, else this
        one."""
        if self.mixture is None:
            return [("data", self)]
        return [(f"data.mixture[{at}]", item) for at, item in enumerate(self.mixture)]

    @property
    def pads(self) -> bool:
        """Whether each sequence has one document, and is filled up."""
        if self.packing is not None:
            return self.packing == "pad"
        return self.padding in (True, "max_length", "longest")


class DatasetProvider(Provider, ABC):
    """A source of documents.

    ``config`` is the section that its ``ProviderSpec`` names, else the one that names the source:
    the profile's ``data``, or an item of ``data.mixture``. ``data_section`` is the latter in either
    case, and ``data_key`` its key in the profile, such as ``data.mixture[1]``; both are set before
    anything is asked.
    """

    data_section: SourceSection = DataSection()
    data_key: str = "data"

    @abstractmethod
    def documents(self) -> Iterator[Record]:
        """Yield the documents to train on, always in the same order and without holding all.

        Raises ConfigError, naming file and place, for what cannot be read.
        """

    def held_out(self) -> Iterator[Record] | None:
        """Yield the documents to evaluate on. None, the default, where the source has none of its
        own: then ``data.val_fraction`` of :meth:`documents` is held out."""
        return None

    def share_read(self) -> float | None:
        """How much of all documents, held-out ones too, has been read since reading last began, 0
        to 1; None, the default, where that cannot be told. It shows how far a build is."""
        return None

    def fingerprint(self) -> str | None:
        """A text that changes whenever a document may have changed, and is cheap to tell. None, the
        default, where that cannot be told: then each run reads all documents."""
        return None

    def bytes_to_hash(self) -> int:
        """How many bytes :meth:`fingerprint` would read now: of files whose hash is not kept. A
        plan does not ask for the fingerprint where that takes long."""
        return 0

    def describe(self) -> str:
        """One line for the log and the manifest: what is read, its version, its size."""
        return self.get_name()
