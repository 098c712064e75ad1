"""Builds the tokenizer and loads the text that a profile names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from apt_core.data.tokens import Ids, ids_sha256, tokenize
from apt_core.errors import ConfigError, Problem, ProviderError
from apt_core.kernel import Kernel
from apt_core.providers.dataset import DatasetProvider, TextData
from apt_core.providers.tokenizer import TokenizerProvider


@dataclass(frozen=True)
class TokenizedText:
    """The text of a run: the ids ``train`` and ``val`` (held out), 1-D and maybe memory-mapped,
    what the dataset says of the text they are of, and ``bytes_per_token`` of the held-out part (of
    UTF-8)."""

    train: Ids
    val: Ids
    description: str
    sha256: str
    bytes_per_token: float

    @classmethod
    def of(cls, text: TextData, tokenizer: TokenizerProvider) -> TokenizedText:
        """``text`` as ids. Raises ConfigError for ids outside the vocabulary."""
        train, val = tokenize(tokenizer, text.train), tokenize(tokenizer, text.val)
        num_bytes = len(text.val.encode("utf-8", errors="surrogatepass"))
        return cls(train, val, text.description, text.sha256, num_bytes / max(1, val.size))

    @cached_property
    def tokens_sha256(self) -> dict[str, str]:
        """The hashes of the ids, by part."""
        return {"train": ids_sha256(self.train), "val": ids_sha256(self.val)}

    def row(self) -> dict[str, Any]:
        """What the manifest and checkpoints record of it."""
        return {
            "description": self.description,
            "sha256": self.sha256,
            "tokens_sha256": self.tokens_sha256,
            "train_tokens": int(self.train.size),
            "val_tokens": int(self.val.size),
        }


def build_tokenizer(kernel: Kernel) -> TokenizerProvider:
    """The profile's tokenizer. Raises ConfigError if ``model.vocab_size`` is less than its ids."""
    config = kernel.config
    name = config.data.tokenizer_name
    tokenizer: TokenizerProvider = kernel.registry.get("tokenizer", name)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            Problem(
                f"is {config.model.vocab_size}, but tokenizer {name!r} has "
                f"{tokenizer.vocab_size} ids",
                key="model.vocab_size",
                hint=f"set it to {tokenizer.vocab_size} or more",
            )
        )
    return tokenizer


def load_tokens(kernel: Kernel, tokenizer: TokenizerProvider) -> TokenizedText:
    """The text of the run as ids of ``tokenizer``; raises what the two steps do."""
    return TokenizedText.of(load_text(kernel), tokenizer)


def load_text(kernel: Kernel) -> TextData:
    """The text of the run. Raises ConfigError for what cannot be read, ProviderError for a dataset
    that loads anything but text."""
    name = kernel.config.data.dataset_name
    provider = kernel.registry.get("dataset", name)
    if isinstance(provider, DatasetProvider):
        provider.data_section = kernel.config.data
    loaded = provider.load()
    if not isinstance(loaded, TextData):
        plugin = kernel.registry.spec("dataset", name).plugin
        raise ProviderError(
            f"dataset:{name} (plugin {plugin}): load() returned a {type(loaded).__name__}, not "
            "TextData"
        )
    return loaded
