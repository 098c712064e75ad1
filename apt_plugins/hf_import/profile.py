"""The profile of an imported run: the data and the training that are asked for, with the folder's
model."""

from __future__ import annotations

from typing import Any

from apt_core.config import Override, Source, read_profile
from apt_core.errors import ConfigError, Problem
from apt_core.kernel import Kernel, boot
from apt_core.runs.layout import TOKENIZER
from apt_plugins.hf_import.asked import Asked
from apt_plugins.hf_import.hf_config import CONFIG, HFModel, leaves

CONTEXT = "model.max_seq_len"
"""The key of the model that the command line may set: all others are the folder's."""

WINDOW, VAL_CHARS = 512, 20_000
"""The longest training sequence of a run whose profile does not say one: contexts of models are
long, and texts to begin with short. The characters that are held out where there is no profile:
large models take minutes for more."""


def source_of(asked: Asked) -> Source:
    if asked.profile:
        return read_profile(asked.profile, asked.overrides)
    return Source.from_dict({"name": asked.folder.name or "imported"}).with_overrides(
        asked.overrides
    )


def asked_context(asked: Asked) -> int | None:
    """The context that the command line asks for; what is none is refused later."""
    source = source_of(asked)
    found = source.get(CONTEXT) if _is_asked(source, CONTEXT) else None
    return found if type(found) is int and found > 0 else None


def _is_asked(source: Source, key: str) -> bool:
    """Whether the command line has set a key."""
    return source.has(key) and source.where(key).startswith("--")


def kernel_of(asked: Asked, model: HFModel, rank: int | None = None) -> Kernel:
    """The profile with the folder's model; with a ``rank`` its attention is TVA."""
    source = source_of(asked)
    keys = dict(model.keys)
    if rank is not None:
        mha = keys.pop("mha")
        keys["attention_name"] = "tva_default"
        keys["tva"] = {**{k: v for k, v in mha.items() if k != "head_dim"}, "rank": rank}
    keys |= {name: None for name in ("attention_pattern", "logits_soft_cap", "ngram")}
    keys |= {
        "embedding_norm": False,
        "ffn_name": "default",
        "norm_name": "rmsnorm",
        "position_name": "rope",
        "backbone_name": "gpt",
    }
    values: dict[tuple[str, ...], Any] = {}
    for path in leaves(keys):
        value: Any = keys
        for key in path:
            value = value[key]
        values["model", *path] = value
    problems = [
        Problem(
            f"is {source.get(path)!r}, and the imported model has {value!r}",
            ".".join(path),
            source.where(path),
            "leave it out: the model is the folder's",
        )
        for path, value in sorted(values.items())
        if _is_asked(source, ".".join(path)) and source.get(path) != value
    ]
    if problems:
        raise ConfigError(problems)
    values["data", "tokenizer_name"] = "hf"
    values["data", "tokenizer", "path"] = str(asked.output / TOKENIZER)
    if source.get("data.max_length") is None:
        values["data", "max_length"] = min(WINDOW, keys["max_seq_len"])
    if not asked.profile and source.get("data.max_val_chars") is None:
        values["data", "max_val_chars"] = VAL_CHARS
    where = str(asked.folder / CONFIG)
    added = [Override(path, value, where) for path, value in values.items()]
    return boot(source, plugins=asked.plugins, overrides=added)
