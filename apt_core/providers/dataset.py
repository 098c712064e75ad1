"""Providers of text to train on (kind ``dataset``)."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from apt_core.providers.base import Provider

if TYPE_CHECKING:
    from apt_core.config.schema import DataSection


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
