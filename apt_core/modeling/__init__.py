"""Layers, backbones, and what builds a model of them."""

from apt_core.modeling.compose import ModelBuilder
from apt_core.modeling.init import (
    construction_rng,
    generator_for,
    initialize_parameters,
    write_std,
)
from apt_core.modeling.probe import probe_layer

__all__ = [
    "ModelBuilder",
    "construction_rng",
    "generator_for",
    "initialize_parameters",
    "probe_layer",
    "write_std",
]
