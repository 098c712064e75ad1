"""Layers, backbones, and the builder that composes a model from them."""

from apt_core.modeling.calling import forward_batch
from apt_core.modeling.casts import KeptCasts, cast_weight
from apt_core.modeling.compose import ModelBuilder
from apt_core.modeling.init import (
    generator_for,
    initialize_parameters,
    write_std,
)
from apt_core.modeling.kv_cache import KeyValueCache
from apt_core.modeling.masks import (
    Tokens,
    document_mask,
    document_positions,
    padding_marked,
    padding_mask,
    padding_positions,
)
from apt_core.modeling.probe import probe_layer
from apt_core.modeling.transforms import Carried, ModelTransform

__all__ = [
    "Carried",
    "KeptCasts",
    "KeyValueCache",
    "ModelBuilder",
    "ModelTransform",
    "Tokens",
    "cast_weight",
    "document_mask",
    "document_positions",
    "forward_batch",
    "generator_for",
    "initialize_parameters",
    "padding_marked",
    "padding_mask",
    "padding_positions",
    "probe_layer",
    "write_std",
]
