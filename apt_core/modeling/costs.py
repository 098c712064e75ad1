"""Counts the costs of a model by part: parameters, FLOPs and the KV cache.

FLOPs are those of training: the forward, and twice as many for the backward. A multiply-add counts
as two, and attention scores as a full T x T matrix. They are given per token of a sequence of T
tokens, the length that a run trains on. Providers give the figures of their layers; the output
projection adds 2 * d_model * vocab_size to the forward; norms, embeddings and element-wise
operations count as nothing. The cache is counted in bf16, as the mean over a sequence of
``model.max_seq_len`` tokens; in fp32 it is twice as large.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import torch
from torch import nn

from apt_core.config import Config
from apt_core.config.schema import ModelSection
from apt_core.device import autocast_dtype
from apt_core.error_text import one_line
from apt_core.kernel import Kernel
from apt_core.kinds import KINDS
from apt_core.modeling.blocks import block_stack
from apt_core.modeling.compose import ModelBuilder
from apt_core.modeling.layers.ngram import NgramEmbedding
from apt_core.types import ProviderSource, ProviderSpec

BACKWARD_AND_FORWARD = 3
CACHE_DTYPE, CACHE_BYTES = "bfloat16", 2

LAYERS = tuple(kind.name for kind in KINDS.values() if "create_layer" in kind.methods)

Part = tuple[str, str]
"""Kind and name of the provider as the profile names it; embeddings and n-grams have no name."""

EMBEDDINGS: Part = ("embeddings", "")
NGRAMS: Part = ("ngrams", "")


@dataclass(frozen=True)
class PartCost:
    """The costs of one part of the model over all its layers; JSON values.

    Unknown figures are None: a third-party provider need not give them, and attention that decodes
    without a cache has no cache size. ``supports`` are the features that an attention claims.
    """

    kind: str
    asked: str
    used: str
    layers: int | None
    params: int
    flops_per_token: int | None
    kv_cache_bytes_per_token: int | None = None
    kv_cache_bytes_per_sequence: int | None = None
    supports: dict[str, bool] | None = None


@dataclass(frozen=True)
class ModelCost:
    """The costs of a model for training on ``seq_len`` tokens and decoding ``max_seq_len``."""

    seq_len: int
    max_seq_len: int
    parts: Sequence[PartCost]
    notes: Sequence[str]

    @property
    def params(self) -> int:
        return sum(part.params for part in self.parts)

    @property
    def flops_per_token(self) -> int | None:
        return _sum([part.flops_per_token for part in self.parts])

    @property
    def kv_cache_bytes_per_token(self) -> int | None:
        return _sum([part.kv_cache_bytes_per_token for part in self._attention()])

    @property
    def kv_cache_bytes_per_sequence(self) -> int | None:
        return _sum([part.kv_cache_bytes_per_sequence for part in self._attention()])

    def row(self) -> dict[str, Any]:
        """The row of the plan."""
        return {
            "seq_len": self.seq_len,
            "max_seq_len": self.max_seq_len,
            "kv_cache_dtype": CACHE_DTYPE,
            "parts": [asdict(part) for part in self.parts],
        }

    def _attention(self) -> Iterator[PartCost]:
        return (part for part in self.parts if part.kind == "attention")


def model_cost(kernel: Kernel, config: Config | None = None) -> ModelCost:
    """The costs of the model of ``config``, by default the profile's, computed without allocating
    it. The registry's resolved providers are asked; a note names each one that cannot give a
    figure."""
    config = config or kernel.config
    model, registry = config.model, kernel.registry
    seq_len = config.seq_len
    counts = count_parameters(config, registry)
    notes: list[str] = []

    def part(kind: str, name: str, layers: int | None, flops: int | None, **more: Any) -> PartCost:
        used = registry.resolutions[kind, name].used if name else ""
        return PartCost(kind, name, used, layers, counts[kind, name], flops, **more)

    parts = []
    heads = {"num_kv_heads": model.num_kv_heads}
    for name, layers in Counter(ModelBuilder(config, registry).attention_names()).items():
        asking = _Asking(kernel, config, "attention", name, notes)
        flops = asking.number("flops", model.d_model, model.num_heads, seq_len, **heads)
        supports = supported(asking.provider)
        held = None
        if supports is None or supports.get("cache"):
            size = (model.d_model, model.num_heads, model.max_seq_len)
            held = asking.number("kv_cache_bytes", *size, **heads, bytes_per_value=CACHE_BYTES)
        parts.append(
            part(
                "attention",
                name,
                layers,
                _per_token(flops, layers * BACKWARD_AND_FORWARD, seq_len),
                kv_cache_bytes_per_token=_per_token(held, layers, model.max_seq_len),
                kv_cache_bytes_per_sequence=None if held is None else held * layers,
                supports=supports,
            )
        )
    asking = _Asking(kernel, config, "ffn", model.ffn_name, notes)
    flops = asking.number("flops", model.d_model, model.d_ff, seq_len)
    trained = _per_token(flops, model.num_layers * BACKWARD_AND_FORWARD, seq_len)
    parts.append(part("ffn", model.ffn_name, model.num_layers, trained))
    parts.append(part("norm", model.norm_name, None, 0))
    output = 2 * model.d_model * model.vocab_size * BACKWARD_AND_FORWARD
    parts.append(part(*EMBEDDINGS, None, output))
    if counts[NGRAMS]:
        parts.append(part(*NGRAMS, None, 0))
    return ModelCost(seq_len, model.max_seq_len, parts, notes)


def layer_flops(kernel: Kernel, model: ModelSection, seq_len: int) -> list[float] | None:
    """Training FLOPs of each layer per token of a sequence of ``seq_len``, for the sizes of
    ``model``; None if a provider cannot give them."""
    unsaid: list[str] = []
    config = kernel.config.model_copy(update={"model": model})
    names = ModelBuilder(config, kernel.registry).attention_names()
    asking = _Asking(kernel, config, "ffn", model.ffn_name, unsaid)
    ffn = asking.number("flops", model.d_model, model.d_ff, seq_len)
    heads = {"num_kv_heads": model.num_kv_heads}
    by_name = {
        name: _Asking(kernel, config, "attention", name, unsaid).number(
            "flops", model.d_model, model.num_heads, seq_len, **heads
        )
        for name in dict.fromkeys(names)
    }
    layers = []
    for name in names:
        attention = by_name[name]
        if attention is None or ffn is None:
            return None
        layers.append((attention + ffn) * BACKWARD_AND_FORWARD / seq_len)
    return layers


def layers_of(model: nn.Module) -> Sequence[nn.Module]:
    """The blocks of a backbone, in order."""
    return [*block_stack(model)[1]]


def support_notices(kernel: Kernel, device: torch.device) -> list[str]:
    """A line for each feature that the profile needs and an attention does not claim to support."""
    training = kernel.config.training
    asked = {
        "compile": ("training.compile", training.compile is True, "it breaks the graph"),
        "autocast": (
            "training.mixed_precision",
            autocast_dtype(training.mixed_precision, device, kernel.config.model.d_model)
            is not None,
            "its results in bf16 may be wrong",
        ),
    }
    notices = []
    names = dict.fromkeys(ModelBuilder(kernel.config, kernel.registry).attention_names())
    without = [
        name
        for name in names
        if (supported(kernel.registry.get("attention", name)) or {}).get("cache") is False
    ]
    if len(without) < len(names):
        notices += [
            f"model.attention_pattern: {_words(_used(kernel, 'attention', name))} has no cache: no "
            "layer of the model decodes with one, and every token computes its whole text anew"
            for name in without
        ]
    for name in names:
        supports = supported(kernel.registry.get("attention", name)) or {}
        spec = _used(kernel, "attention", name)
        for flag, (key, wanted, consequence) in asked.items():
            if wanted and supports.get(flag) is False:
                notices.append(
                    f"{key}: {_words(spec)} does not claim to support {flag} ({consequence})"
                )
    return notices


def supported(provider: Any) -> dict[str, bool] | None:
    """The features that an attention provider claims to support, by name; None if it does not
    say."""
    supports = getattr(provider, "supports", None)
    if not is_dataclass(supports) or isinstance(supports, type):
        return None
    return asdict(supports)


def count_parameters(config: Config, registry: ProviderSource) -> Counter[Part]:
    """Parameters by part; those outside of layers (embeddings, output projection and others) count
    as embeddings."""
    noting = _NotingRegistry(registry)
    with torch.device("meta"):
        built = ModelBuilder(config, noting).build_model()
    owners = {
        id(parameter): part for part, layer in noting.made for parameter in layer.parameters()
    }
    for module in built.modules():
        if isinstance(module, NgramEmbedding):
            owners[id(module.weight)] = NGRAMS
    counts: Counter[Part] = Counter()
    for parameter in built.parameters():
        counts[owners.get(id(parameter), EMBEDDINGS)] += parameter.numel()
    return counts


class _NotingRegistry:
    """A registry that records every created layer with the part it belongs to."""

    def __init__(self, registry: ProviderSource) -> None:
        self._registry = registry
        self.made: list[tuple[Part, nn.Module]] = []

    def spec(self, kind: str, name: str) -> ProviderSpec:
        return self._registry.spec(kind, name)

    def get(self, kind: str, name: str, config: Any = None, fallback: bool = True) -> Any:
        provider = self._registry.get(kind, name, config, fallback)
        return _NotingProvider(self, (kind, name), provider) if kind in LAYERS else provider


class _NotingProvider:
    def __init__(self, registry: _NotingRegistry, part: Part, provider: Any) -> None:
        self._registry, self._part, self._provider = registry, part, provider

    def create_layer(self, *args: Any, **options: Any) -> nn.Module:
        layer: nn.Module = self._provider.create_layer(*args, **options)
        self._registry.made.append((self._part, layer))
        return layer


class _Asking:
    """Asks the provider of ``kind`` and ``name``, with the settings of ``config``, for figures, and
    adds a note for each unknown one."""

    def __init__(
        self, kernel: Kernel, config: Config, kind: str, name: str, notes: list[str]
    ) -> None:
        section = kernel.registry.spec(kind, name).section
        settings = config.section(section) if section else None
        self.provider: Any = kernel.registry.get(kind, name, settings)
        self._words = _words(_used(kernel, kind, name))
        self._notes = notes

    def number(self, method: str, *args: Any, **options: Any) -> int | None:
        """The result of ``method``, or None with a note."""
        if not callable(getattr(self.provider, method, None)):
            self._notes.append(f"{self._words} has no {method}(): the figure is unknown")
            return None
        try:
            value = int(getattr(self.provider, method)(*args, **options))
            if value < 0:
                raise ValueError(f"{value} is negative")
        except Exception as error:
            reason = one_line(error)
            self._notes.append(f"{self._words} failed in {method}(): {reason}")
            return None
        return value


def _used(kernel: Kernel, kind: str, name: str) -> ProviderSpec:
    return kernel.registry.spec(kind, kernel.registry.resolutions[kind, name].used)


def _words(spec: ProviderSpec) -> str:
    return f"{spec.key} (plugin {spec.plugin})"


def _per_token(value: int | None, times: int, tokens: int) -> int | None:
    return None if value is None else value * times // tokens


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
