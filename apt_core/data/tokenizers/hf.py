"""Tokenizers in the format of Hugging Face."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apt_core.data.tokenizers.base import without_derived
from apt_core.data.tokenizers.chat import MAX_TEMPLATE, TEMPLATE_FILE, ChatTemplate
from apt_core.errors import ConfigError
from apt_core.files import read_file, write_atomically
from apt_core.json_files import MAX_BYTES, parse_json
from apt_core.providers.base import read_settings
from apt_core.providers.documents import Document
from apt_core.providers.tokenizer import (
    Encoded,
    SpecialTokens,
    TokenizerProvider,
    TokenizerSettings,
    token_dtype,
)

_KEY = "data.tokenizer.path"
GENERATION_FILE = "generation_config.json"
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class HFFiles:
    """What decides a tokenizer's ids: the text of tokenizer.json, tokenizer_config.json with the
    special tokens, and the chat template. ``ends`` are the ids that end a text of the model that
    the tokenizer came with, as generation_config.json has them."""

    tokenizer: str
    config: dict[str, Any]
    template: str | None
    ends: tuple[int, ...] = ()

    @classmethod
    def read(cls, path: Path) -> HFFiles:
        """Those of a folder, or a tokenizer.json alone. Raises OSError for one that cannot be read,
        ValueError for one that is not what it should be."""
        if not path.is_dir():
            return cls(_text(path), {}, None)
        config = {**_mapping(path / "special_tokens_map.json")}
        config.update(_mapping(path / "tokenizer_config.json"))
        template = config.pop("chat_template", None)
        template = _mapping(path / "chat_template.json").get("chat_template", template)
        if isinstance(template, list):
            named = [each for each in template if isinstance(each, dict)]
            template = next((e.get("template") for e in named if e.get("name") == "default"), None)
        if (path / TEMPLATE_FILE).is_file():
            template = _text(path / TEMPLATE_FILE, MAX_TEMPLATE)
        if template is not None and not isinstance(template, str):
            raise ValueError("its chat_template is no text")
        return cls(_text(path / "tokenizer.json"), config, template, _ends(path))

    def write(self, folder: Path) -> None:
        """Write them, for :meth:`read`."""
        write_atomically(folder / "tokenizer.json", self.tokenizer)
        config = json.dumps(self.config, indent=1, ensure_ascii=False)
        write_atomically(folder / "tokenizer_config.json", config + "\n")
        if self.template is not None:
            write_atomically(folder / TEMPLATE_FILE, self.template)
        if self.ends:
            ends = json.dumps({"eos_token_id": list(self.ends)})
            write_atomically(folder / GENERATION_FILE, ends + "\n")

    @property
    def tokens(self) -> dict[str, str]:
        """The texts of the named special tokens: ``bos_token``, …"""
        found = {}
        for name in _NAMED:
            text = _token_text(self.config.get(f"{name}_token"))
            if text is not None:
                found[f"{name}_token"] = text
        return found


class HFTokenizer(TokenizerProvider):
    """``tokenizer:hf``: a ``tokenizer.json``, or a folder of Hugging Face with one, at
    ``data.tokenizer.path``. Ids are those that `transformers` gives.

    A text begins with bos where the tokenizer puts it there, and ends with eos where it has one.
    Conversations are rendered by its chat template. A special token's name in a text is that token,
    as everywhere in this format.
    """

    name = "hf"
    version = "1.0.0"
    dependencies = ("tokenizers>=0.21",)

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.settings = read_settings(TokenizerSettings, config, "data.tokenizer")
        self._kept: HFFiles | None = None

    def __getstate__(self) -> dict[str, Any]:
        return without_derived(self)

    @cached_property
    def _files(self) -> HFFiles:
        if self._kept is not None:
            return self._kept
        if self.settings.path is None:
            raise ConfigError(
                "names no tokenizer", key=_KEY, hint="give a tokenizer.json, or its folder"
            )
        path = Path(self.settings.path)
        try:
            return HFFiles.read(path)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{error.filename} does not exist",
                key=_KEY,
                hint="the save_pretrained of a fast tokenizer of transformers writes it",
            ) from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the tokenizer {path}: {error}", key=_KEY) from error

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            import tokenizers
        except ImportError as error:
            raise ConfigError(
                "tokenizer hf needs the package tokenizers",
                key="data.tokenizer_name",
                hint='pip install "apt-kernel[data]"',
            ) from error
        text = self._files.tokenizer
        try:
            made = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise ConfigError(
                f"is no tokenizer.json that can be read: {error}", key=_KEY
            ) from error
        made.no_truncation()
        made.no_padding()
        # As transformers does: what the configuration names is a token in any case.
        try:
            for options in _declared_tokens(self._files.config):
                if made.token_to_id(options["content"]) is None:
                    made.add_tokens([tokenizers.AddedToken(**options)])
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"the added_tokens_decoder of its tokenizer_config.json cannot be read: {error}",
                key=_KEY,
            ) from error
        made.add_special_tokens(list(dict.fromkeys(self._files.tokens.values())))
        if not made.get_vocab_size():
            raise ConfigError("the vocabulary of its tokenizer.json is empty", key=_KEY)
        return made

    @cached_property
    def _template(self) -> ChatTemplate | None:
        path = self.settings.chat_template
        if path is not None and self._kept is None:
            return ChatTemplate.read(path, self._files.tokens)
        source = self._files.template
        return None if source is None else ChatTemplate(source, self._files.tokens)

    @property
    def chat_template(self) -> str | None:
        return None if self._template is None else self._template.source

    @cached_property
    def _size(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def vocab_size(self) -> int:
        return self._size

    @cached_property
    def _special(self) -> SpecialTokens:
        tokenizer, tokens = self._tokenizer, self._files.tokens
        ids = {name: tokenizer.token_to_id(text) for name, text in tokens.items()}
        bos = ids.get("bos_token")
        before = tokenizer.encode("", add_special_tokens=True).ids[:1]
        added = tokenizer.get_added_tokens_decoder()
        return SpecialTokens(
            bos=bos if bos in before or self._files.config.get("add_bos_token") else None,
            eos=ids.get("eos_token", ids.get("sep_token")),
            pad=ids.get("pad_token"),
            ends=tuple(each for each in self._files.ends if each < self.vocab_size),
            names={token: each.content for token, each in added.items() if each.special},
        )

    @property
    def special(self) -> SpecialTokens:
        return self._special

    def to_json(self) -> str:
        """Its tokenizer.json with the tokens that its configuration adds."""
        text: str = self._tokenizer.to_str()
        return text

    def encode_as_written(self, text: str) -> list[int]:
        """The ids of ``text`` with the special tokens that its tokenizer.json puts around it."""
        with self._refusals():
            found: list[int] = self._tokenizer.encode(text, add_special_tokens=True).ids
        return found

    @property
    def tokens(self) -> dict[str, str]:
        """The texts of the special tokens that its configuration names: ``bos_token``, …"""
        return self._files.tokens

    def encode(self, text: str) -> list[int]:
        found: list[int] = self._encoded(text).ids
        return found

    def _encoded(self, text: str) -> Any:
        text.encode("utf-8")  # a lone surrogate is a ValueError here, a TypeError there
        with self._refusals():
            return self._tokenizer.encode(text, add_special_tokens=False)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Say of texts that the model of tokenizer.json cannot encode whose fault that is."""
        tokenizer = self._tokenizer
        try:
            yield
        except Exception as error:  # of any type, and no more than a text
            model = type(tokenizer.model).__name__
            raise ValueError(f"its tokenizer.json ({model}) refuses a text: {error}") from error

    def decode(self, ids: Sequence[int]) -> str:
        found: str = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
        return found

    def encode_document(self, document: Document) -> Encoded:
        if not document.messages:
            return super().encode_document(document)
        pieces = self._required_template().pieces(document.messages)
        encoded = self._encoded("".join(text for text, _ in pieces))
        ends = np.cumsum([len(text) for text, _ in pieces])
        begins = np.array([begin for begin, _ in encoded.offsets], dtype=np.int64)
        # A token belongs to the piece in which it begins.
        places = np.minimum(np.searchsorted(ends, begins, side="right"), len(pieces) - 1)
        learned = np.array([learned for _, learned in pieces], dtype=bool)[places]
        return Encoded(self._array(encoded.ids), learned)

    def encode_documents(self, documents: Sequence[Document]) -> list[Encoded]:
        """Texts are encoded at once, by the threads of `tokenizers` where it may have some."""
        texts = [document.text for document in documents if document.text is not None]
        for text in texts:
            text.encode("utf-8")
        bos = [] if self.special.bos is None else [self.special.bos]
        eos = [] if self.special.eos is None else [self.special.eos]
        with self._refusals():
            batch = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))

        def around(document: Document, ids: list[int]) -> Encoded:
            before, after = bos if document.begins else [], eos if document.ends else []
            return Encoded(self._array([*before, *ids, *after]))

        return [
            self.encode_document(document)
            if document.text is None
            else around(document, next(batch).ids)
            for document in documents
        ]

    def encode_prompt(self, document: Document) -> list[int]:
        if not document.messages:
            return super().encode_prompt(document)
        return self.encode(self._required_template().prompt(document.messages))

    def _required_template(self) -> ChatTemplate:
        if self._template is None:
            raise ValueError(
                "the tokenizer has no chat template, so that it cannot encode conversations; "
                "data.tokenizer.chat_template names a file with one"
            )
        return self._template

    def _array(self, ids: Sequence[int]) -> npt.NDArray[Any]:
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def save(self, folder: Path) -> None:
        replace(self._files, template=self.chat_template).write(folder)

    def load(self, folder: Path) -> None:
        self._kept = HFFiles.read(folder)
        self.__dict__ = without_derived(self)

    def fingerprint(self) -> str | None:
        # A subclass may encode in another way.
        if type(self) is not HFTokenizer:
            return None
        files = self._files
        config = json.dumps(files.config, sort_keys=True)
        parts = [self.name, self.version, files.tokenizer, config, self.chat_template or ""]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _text(path: Path, limit: int = MAX_BYTES) -> str:
    return read_file(path, limit).decode("utf-8")


def _mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = parse_json(_text(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return found


def _ends(folder: Path) -> tuple[int, ...]:
    found = _mapping(folder / GENERATION_FILE).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(each) is int and each >= 0 for each in ids):
        raise ValueError(f"the eos_token_id of its {GENERATION_FILE} is no id and no list of ids")
    return tuple(sorted({*ids}))


def _token_text(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _declared_tokens(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options of the tokens that ``added_tokens_decoder`` declares, in the order of their ids.
    Raises ValueError for what declares none."""
    declared = config.get("added_tokens_decoder", {})
    if not isinstance(declared, dict) or not all(
        isinstance(entry, dict) and _token_text(entry) is not None for entry in declared.values()
    ):
        raise ValueError("it is no mapping of ids to tokens with their content")
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return [
        {name: entry[name] for name in names if name in entry}
        for _, entry in sorted(declared.items(), key=lambda item: int(item[0]))
    ]
