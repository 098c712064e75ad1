"""Providers of text to train on (kind ``dataset``)."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field

from apt_core.kinds import KINDS
from apt_core.providers.base import Provider
from apt_core.sections import Name, Section, Size, one_of


class DataSection(Section):
    """``data``: where the text comes from and how it becomes tokens."""

    source: Name | None = Field(
        default=None,
        description="Built-in text, such as pydoc. Without it the loader reads; where that is the "
        "default one and has no train_path, the text is pydoc.",
    )
    train_path: Name | None = Field(default=None, description="File to train on.")
    val_path: Name | None = Field(
        default=None, description="File to evaluate on; without it the last tenth is held out."
    )
    loader: Name = Field(
        KINDS["dataset"].default,
        description="Provider that reads train_path; any but text_default is used without one too.",
    )
    tokenizer_name: Name = Field(
        KINDS["tokenizer"].default, description="Provider of the tokenizer."
    )
    max_length: Size | None = Field(
        default=None, description="Tokens per training sequence; without it, model.max_seq_len."
    )
    truncation: bool | None = Field(default=None, description="Cut texts that are too long.")
    padding: (
        Annotated[
            Literal[True, False, "max_length", "longest", "do_not_pad"],
            one_of(True, False, "max_length", "longest", "do_not_pad"),
        ]
        | None
    ) = Field(default=None, description="Fill texts that are too short.")

    @property
    def text_source(self) -> str | None:
        """The built-in text to train on, or None where the loader reads instead."""
        asked = self.train_path or self.loader != KINDS["dataset"].default
        return self.source or (None if asked else "pydoc")

    @property
    def dataset_name(self) -> str:
        """The provider of the text."""
        return self.text_source or self.loader


@dataclass(frozen=True)
class TextData:
    """The text of a run: what to train on, what to validate on, and where it is from.

    ``description`` is one line for the log and the manifest: the source, its version, its sizes.
    """

    train: str
    val: str
    description: str

    @cached_property
    def sha256(self) -> str:
        """The hash of both parts; figures measured on different hashes are not comparable."""
        digest = hashlib.sha256()
        for part in (self.train, self.val):
            data = part.encode("utf-8", errors="surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


class DatasetProvider(Provider, ABC):
    """Reads text.

    ``config`` is the section that its ``ProviderSpec`` names, else the profile's ``data``;
    ``data_section`` is the latter in either case, set before a run calls :meth:`load`.
    """

    data_section: DataSection | None = None

    @abstractmethod
    def load(self) -> TextData:
        """Read everything. Raises ConfigError, naming file and place, for what cannot be read."""
