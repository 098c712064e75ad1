"""``ModelBuilder`` builds a model from a profile with the providers of the registry."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

from torch import nn

from apt_core.config import Config, parse_config
from apt_core.modeling.init import construction_rng, initialize_parameters
from apt_core.modeling.layers.ngram import NgramEmbedding
from apt_core.providers.attention import AttentionProvider
from apt_core.providers.backbone import BackboneProvider
from apt_core.providers.ffn import FeedForwardProvider
from apt_core.providers.norm import NormProvider
from apt_core.providers.position import PositionProvider
from apt_core.types import ProviderSource


class ModelBuilder:
    """Builds a model, or one part of it, from a profile.

    ``config`` is a validated profile, or a plain dict with its keys
    (``{"model": {"d_model": 64}}``; what is left out takes the profile's defaults);
    ``registry`` the source of providers, by default the process-wide one. Every part is initialised
    by (seed, parameter name), with ``training.seed`` unless ``seed`` is given; no global generator
    is drawn from or changed. Under ``torch.device("meta")`` nothing is allocated or initialised.
    Raises ConfigError for a dict that is no valid profile.
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any],
        registry: ProviderSource | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        if registry is None:
            from apt_core.registry import registry as default_registry

            registry = cast(ProviderSource, default_registry)
        self.config = config if isinstance(config, Config) else parse_config(config)
        self.registry = registry
        self.model = self.config.model
        self.seed = self.config.training.seed if seed is None else seed

    def attention_names(self) -> list[str]:
        """The attention of every layer: ``model.attention_pattern`` repeated over the layers, or
        ``model.attention_name`` for all."""
        return [self._attention_name(layer) for layer in range(self.model.num_layers)]

    def build_block(self, layer: int = 0) -> nn.Module:
        """Block ``layer``: attention, feed-forward and their norms."""
        with construction_rng(self.seed, f"blocks.{layer}"):
            built = self._block(layer)
        return self._initialized(built)

    def build_model(self, *, initialize: bool = True) -> nn.Module:
        """The whole model; it returns :class:`~apt_core.types.ModelOutput`. Without ``initialize``
        its parameters are as the constructors leave them, for weights that are to be loaded."""
        with construction_rng(self.seed, "model"):
            position = self._position()
            built = self._backbone().create_model(
                vocab_size=self.model.vocab_size,
                d_model=self.model.d_model,
                max_seq_len=self.model.max_seq_len,
                blocks=[self._block(layer) for layer in range(self.model.num_layers)],
                final_norm=self._norm(),
                position=position
                and position.create_embedding(self.model.d_model, self.model.max_seq_len),
                tie_embeddings=self.model.tie_embeddings,
                dropout=self.model.dropout,
                logits_soft_cap=self.model.logits_soft_cap,
                **self._embedding_parts(),
            )
        return self._initialized(built, only=None if initialize else ())

    def _initialized(self, module: nn.Module, only: Collection[str] | None = None) -> nn.Module:
        initialize_parameters(module, self.seed, num_layers=self.model.num_layers, only=only)
        return module

    def _block(self, layer: int) -> nn.Module:
        backbone = self._backbone()
        with construction_rng(self.seed, f"blocks.{layer}.attention"):
            attention = self._attention(layer)
        with construction_rng(self.seed, f"blocks.{layer}.ffn"):
            ffn = self._ffn()
        return backbone.create_block(
            attention=attention,
            ffn=ffn,
            norms=[self._norm() for _ in range(backbone.norms_per_block)],
            dropout=self.model.dropout,
        )

    def _attention_name(self, layer: int) -> str:
        pattern = self.model.attention_names
        return pattern[layer % len(pattern)]

    def _attention(self, layer: int) -> nn.Module:
        name = self._attention_name(layer)
        provider = cast(AttentionProvider, self._provider("attention", name))
        return provider.create_layer(
            self.model.d_model,
            self.model.num_heads,
            max_seq_len=self.model.max_seq_len,
            dropout=self.model.dropout,
            position=self._position(),
            num_kv_heads=self.model.num_kv_heads,
        )

    def _ffn(self) -> nn.Module:
        provider = cast(FeedForwardProvider, self._provider("ffn", self.model.ffn_name))
        return provider.create_layer(self.model.d_model, self.model.d_ff, self.model.dropout)

    def _norm(self) -> nn.Module:
        provider = cast(NormProvider, self._provider("norm", self.model.norm_name))
        return provider.create_layer(self.model.d_model)

    def _position(self) -> PositionProvider | None:
        name = self.model.position_name
        return None if name == "none" else cast(PositionProvider, self._provider("position", name))

    def _embedding_parts(self) -> dict[str, nn.Module]:
        """What the profile adds to the embeddings: backbones need know of no more than that."""
        parts: dict[str, nn.Module] = {}
        ngram = self.model.ngram
        if ngram is not None:
            parts["ngram"] = NgramEmbedding(
                self.model.d_model, ngram.orders, ngram.buckets, ngram.lr_scale
            )
        if self.model.embedding_norm:
            parts["embedding_norm"] = self._norm()
        return parts

    def _backbone(self) -> BackboneProvider:
        name = self.model.backbone_name
        return cast(BackboneProvider, self._provider("backbone", name))

    def _provider(self, kind: str, name: str) -> Any:
        section = self.registry.spec(kind, name).section
        settings = self.config.section(section) if section else None
        return self.registry.get(kind, name, settings)
