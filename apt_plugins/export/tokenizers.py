"""A run's tokenizer in the format of the package `tokenizers`, which other programs read."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_core import ConfigError
from apt_core.data.tokenizers.bpe import SYMBOLS
from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.data.tokenizers.char import CharTokenizer
from apt_core.data.tokenizers.hf import HFTokenizer
from apt_core.error_text import one_line
from apt_core.files import write_atomically
from apt_core.inference.chat import ChatFormat
from apt_core.providers.documents import Document
from apt_core.providers.tokenizer import TokenizerProvider

SAMPLE = "a b"


@dataclass(frozen=True)
class ExpressedTokenizer:
    """A tokenizer as other programs know it: the content of ``tokenizer.json``, and the texts of
    its special tokens by what they do (``bos_token``, ``eos_token``, ``pad_token``). ``ends`` are
    the ids that end a text, ``ids`` those of the named special tokens."""

    data: dict[str, Any]
    tokens: dict[str, str]
    ids: dict[str, int]
    ends: tuple[int, ...]

    def write(self, folder: Path, max_seq_len: int, chat_template: str | None) -> None:
        """Write the files of a Hugging Face folder. Raises OSError."""
        text = json.dumps(self.data, ensure_ascii=False, indent=1)
        write_atomically(folder / "tokenizer.json", text + "\n")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_seq_len,
            "clean_up_tokenization_spaces": False,
            **self.tokens,
        }
        text = json.dumps(config, ensure_ascii=False, indent=1)
        write_atomically(folder / "tokenizer_config.json", text + "\n")
        if chat_template is not None:
            write_atomically(folder / "chat_template.jinja", chat_template)


BEGINNINGS = ("{{ bos_token }}", "{{ bos_token }}{{ ' ' }}")
"""What may begin a text in Jinja: some tokenizers put a space before the first word of a text, and
not before what follows a special token."""


def chat_template_of(chat_format: ChatFormat, tokenizer: TokenizerProvider) -> str | None:
    """The Jinja source that gives other programs the prompts of ``chat_format``; None where that is
    the tokenizer's template and it has none."""
    if not chat_format.jinja:
        return tokenizer.chat_template
    if tokenizer.special.bos is None:
        return chat_format.jinja
    try:
        found = expressed(tokenizer)
    except ValueError:  # an exporter that cannot do without says so
        return BEGINNINGS[0] + chat_format.jinja
    if "bos_token" not in found.tokens:
        return chat_format.jinja
    import tokenizers

    made = tokenizers.Tokenizer.from_str(json.dumps(found.data))
    wanted, bos = tokenizer.encode_prompt(Document(text=SAMPLE)), found.tokens["bos_token"]
    for beginning, between in zip(BEGINNINGS, ("", " "), strict=True):
        if made.encode(f"{bos}{between}{SAMPLE}", add_special_tokens=False).ids == wanted:
            return beginning + chat_format.jinja
    return BEGINNINGS[0] + chat_format.jinja


def expressed(tokenizer: TokenizerProvider) -> ExpressedTokenizer:
    """``tokenizer`` for other programs.

    Raises ValueError, with the reason, for one that the format cannot express: any but the core's
    whose ``save`` writes no ``tokenizer.json``.
    """
    special = tokenizer.special
    own: dict[str, str] = {}
    if type(tokenizer) is ByteTokenizer:
        data = _byte_level(tokenizer)
    elif type(tokenizer) is CharTokenizer:
        data = _characters(tokenizer)
    else:
        data, own = _saved(tokenizer)
    names = {token["id"]: token["content"] for token in data.get("added_tokens") or ()}
    names |= dict(special.names)
    ids = {"bos_token": special.bos, "eos_token": special.eos, "pad_token": special.pad}
    found = {key: token for key, token in ids.items() if token is not None}
    tokens = {**own, **{key: names[token] for key, token in found.items() if token in names}}
    ends = {special.eos, special.end, *special.roles.values(), *special.ends}
    return ExpressedTokenizer(
        data,
        tokens,
        found,
        tuple(sorted(t for t in ends if t is not None)),
    )


def _byte_level(tokenizer: ByteTokenizer) -> dict[str, Any]:
    """Byte-pair encoding without a pair to merge: each byte is a token, by its own number."""
    names = tokenizer.special.names
    vocab = {names.get(byte, SYMBOLS[byte]): byte for byte in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level |= {"use_regex": False}
    return _json(vocab, names, pre_tokenizer=level, decoder=level)


def _characters(tokenizer: CharTokenizer) -> dict[str, Any]:
    """Characters without a pair to merge; the bytes of those that have no id of their own."""
    vocab = {chr(byte): byte for byte in range(128)}
    vocab |= {f"<0x{byte:02X}>": byte for byte in range(128, 256)}
    vocab |= {char: 256 + number for number, char in enumerate(tokenizer.characters)}
    names = tokenizer.special.names
    vocab |= {name: token for token, name in names.items()}
    steps = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    decoder = {"type": "Sequence", "decoders": steps}
    return _json(vocab, names, decoder=decoder, byte_fallback=True)


def _json(
    vocab: dict[str, int],
    names: Any,
    *,
    pre_tokenizer: dict[str, Any] | None = None,
    decoder: dict[str, Any],
    byte_fallback: bool = False,
) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": name, **plain, "special": True} for i, name in names.items()]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": byte_fallback,
            "ignore_merges": False,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [],
        },
    }


def _saved(tokenizer: TokenizerProvider) -> tuple[dict[str, Any], dict[str, str]]:
    """The tokenizer.json that ``tokenizer`` saves, and the special tokens that it names beside
    it."""
    name = tokenizer.get_name()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            tokenizer.save(folder)
        except Exception as error:  # of whoever wrote it
            reason = one_line(error)
            raise ValueError(f"saving the tokenizer {name} failed: {reason}") from error
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(
                f"the tokenizer {name} saves no tokenizer.json, which other programs read"
            )
        kept = HFTokenizer()
        try:
            kept.load(folder)
            data = json.loads(kept.to_json())
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if kept.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"the tokenizer {name} has {tokenizer.vocab_size} ids, and its "
                f"tokenizer.json {kept.vocab_size}"
            )
        wanted = tokenizer.encode_prompt(Document(text=SAMPLE))
        if kept.encode_as_written(SAMPLE) != wanted:
            names = {token: name for name, token in data["model"].get("vocab", {}).items()}
            names |= {token["id"]: token["content"] for token in data["added_tokens"]}
            data["post_processor"] = _beginning(tokenizer.special.bos, names)
        return data, kept.tokens


def _beginning(bos: int | None, names: dict[int, str]) -> dict[str, Any] | None:
    """What puts the token ``bos`` before a text, and nothing after it."""
    if bos is None:
        return None
    one = {"SpecialToken": {"id": names[bos], "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [one, texts[0]],
        "pair": [one, *texts],
        "special_tokens": {names[bos]: {"id": names[bos], "ids": [bos], "tokens": [names[bos]]}},
    }
