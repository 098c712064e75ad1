"""Providers that write a model for another program (kind ``exporter``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from apt_core.errors import Problem
from apt_core.providers.base import Provider
from apt_core.providers.plain import PlainModel, PlainShape
from apt_core.providers.tokenizer import TokenizerProvider


@dataclass(frozen=True)
class Proof:
    """How an export is run by the program that it is for.

    ``script`` is run by a Python of its own that has APT not; what it gets and writes is told in
    ``apt_plugins/export/proofs/child.py``. ``runtime`` is the program's name, ``requires`` the PEP
    508 requirements of the script, ``extra`` an extra of APT that brings them, if one does. Logits
    may differ by ``tolerance`` times the largest of them, or ``tolerance`` itself where that is
    below 1, at all but ``1 - share`` of the places. Texts to encode are brought to Unicode's
    ``normal_form``, where the program leaves that to others. ``settings`` are handed to the script;
    values are JSON's.
    """

    runtime: str
    script: Path
    requires: tuple[str, ...]
    tolerance: float
    share: float = 1.0
    normal_form: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = None
    extra: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ExportJob:
    """What :meth:`ExporterProvider.write` gets: an empty ``folder`` to write to, the ``model`` and
    its ``tokenizer``, the ``name`` of the run, and ``advance``, to be told what is being written.
    ``chat_template`` is the Jinja source of what conversations become for this model, which may
    have learned another form than that of its tokenizer's template; None where it has none."""

    folder: Path
    model: PlainModel
    tokenizer: TokenizerProvider
    name: str
    chat_template: str | None
    advance: Callable[[str], None] = lambda what: None


class ExporterProvider(Provider, ABC):
    """Writes models in plain form for another program. Its settings are what ``apt-export
    --option`` gives.

    ``holds`` names what its files can hold of what is beyond a bare plain form, and a form says
    (:class:`~apt_core.providers.plain.Beyond`): ``window`` is attention in a window.
    """

    holds: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def check(self, shape: PlainShape, tokenizer: TokenizerProvider) -> Iterable[Problem]:
        """Why a model of this shape, or its tokenizer, cannot be written; nothing is written
        yet."""

    @abstractmethod
    def write(self, job: ExportJob) -> None:
        """Write all files of the export into ``job.folder``. Raises OSError where that cannot be
        done."""

    def stored(self, model: PlainModel) -> PlainModel | None:
        """``model`` with the weights that the export holds, where it rounds them; None, the
        default, where it does not. Its program is compared with this, and what rounding costs is
        told beside."""
        return None

    def usage(self, folder: str) -> str:
        """How the export in ``folder`` is used, in Markdown, for its card."""
        return ""

    @property
    def proof(self) -> Proof | None:
        """How to run what was written; None, the default, where nothing is known that could."""
        return None
