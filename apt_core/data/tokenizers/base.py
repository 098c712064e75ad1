"""What the core's own tokenizers share: settings, special tokens, chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from apt_core.data.tokenizers.chat import (
    CHAT_TEMPLATE,
    MAX_TEMPLATE,
    TEMPLATE_FILE,
    ChatTemplate,
    Escaped,
)
from apt_core.files import read_file, write_atomically
from apt_core.providers.base import read_settings
from apt_core.providers.documents import LEARNED_ROLE, Document
from apt_core.providers.tokenizer import (
    SPECIAL_NAMES,
    Segment,
    TokenizerProvider,
    TokenizerSettings,
)


class CoreTokenizer(TokenizerProvider):
    """Base class of ``byte``, ``char`` and ``bpe``: conversations are turns between the special
    tokens of SPECIAL_NAMES, or what the template of ``data.tokenizer.chat_template`` makes of them,
    in which the names of special tokens stand for these. Text never becomes a special token.
    What is saved has that template, so that its file is not needed again.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.settings = read_settings(TokenizerSettings, config, "data.tokenizer")
        self._kept_template: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return without_derived(self)

    @property
    def chat_template(self) -> str:
        return CHAT_TEMPLATE if self._template is None else self._template.source

    @cached_property
    def _template(self) -> ChatTemplate | None:
        path, kept = self.settings.chat_template, self._kept_template
        names = {"eos_token": SPECIAL_NAMES[0], "pad_token": SPECIAL_NAMES[1]}
        if kept is not None:
            return ChatTemplate(kept, names)
        return None if path is None else ChatTemplate.read(path, names)

    def save(self, folder: Path) -> None:
        if self._template is not None:
            write_atomically(folder / TEMPLATE_FILE, self._template.source)

    def load(self, folder: Path) -> None:
        path = folder / TEMPLATE_FILE
        kept = read_file(path, MAX_TEMPLATE).decode("utf-8") if path.is_file() else None
        self._kept_template = kept
        self.__dict__ = without_derived(self)

    @cached_property
    def _escaped(self) -> Escaped:
        return Escaped(SPECIAL_NAMES)

    def segments(self, document: Document) -> list[Segment]:
        """As every tokenizer's; a template's conversation is ended by eos where the template does
        not end it."""
        if not document.messages or self._template is None:
            return super().segments(document)
        found = self._split(self._template.pieces(self._protected(document).messages))
        eos = self.special.eos
        if eos is not None and (not found or found[-1][0] != eos):
            found.append((eos, document.messages[-1].role == LEARNED_ROLE))
        return found

    def encode_prompt(self, document: Document) -> list[int]:
        if not document.messages or self._template is None:
            return super().encode_prompt(document)
        text = self._template.prompt(self._protected(document).messages)
        found: list[int] = []
        for each, _ in self._split([(text, False)]):
            found += [each] if isinstance(each, int) else self.encode(each)
        return found

    def _protected(self, document: Document) -> Document:
        escape = self._escaped.escape
        return replace(
            document,
            messages=tuple(
                replace(each, content=escape(each.content)) for each in document.messages
            ),
        )

    def _split(self, pieces: Sequence[tuple[str, bool]]) -> list[Segment]:
        ids = {name: token for token, name in self.special.names.items()}
        found: list[Segment] = []
        for text, learned in pieces:
            for index, part in enumerate(self._escaped.split(text)):
                if part:
                    found.append((ids[part] if index % 2 else part, learned))
        return found


def without_derived(tokenizer: TokenizerProvider) -> dict[str, Any]:
    """What ``tokenizer`` consists of, without what its cached properties made of that: compiled
    templates and the like cannot be pickled."""
    return {
        name: value
        for name, value in vars(tokenizer).items()
        if not isinstance(getattr(type(tokenizer), name, None), cached_property)
    }
