"""The tokenizer and the text of a run, as its profile names them."""

from __future__ import annotations

from apt_core.errors import ConfigError, Problem, ProviderError
from apt_core.kernel import Kernel
from apt_core.providers.dataset import DatasetProvider, TextData
from apt_core.providers.tokenizer import TokenizerProvider


def build_tokenizer(kernel: Kernel) -> TokenizerProvider:
    """The profile's tokenizer. Raises ConfigError if the model has fewer ids than it."""
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
