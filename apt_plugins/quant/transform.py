"""The transforms of a model: to weights that are kept as integers, and to rounded ones."""

from __future__ import annotations

from torch import nn

from apt_core import ConfigError
from apt_core.modeling import ModelTransform
from apt_plugins.quant.layers import Choice, choose, fake, pack
from apt_plugins.quant.rounding import Rounding
from apt_plugins.quant.settings import SECTION, QuantSettings

TOLERANCE = 1.0
"""The nats per token by which rounding may change the loss where training with it begins: a model
is not to be lost, but it learns again what it loses."""


def rounding_of(settings: QuantSettings) -> Rounding:
    return Rounding(8) if settings.bits == 8 else Rounding(4, settings.group)


def chosen(model: nn.Module, rounding: Rounding) -> Choice:
    """:func:`~apt_plugins.quant.layers.choose`. Raises ConfigError where nothing is rounded."""
    choice = choose(model, rounding)
    if choice.layers:
        return choice
    why = sorted({kept.reason for kept in choice.kept})
    raise ConfigError(
        f"no weight of the model can be rounded to {rounding.bits} bits: "
        f"{'; '.join(why) or 'its blocks have no matrices'}",
        f"{SECTION}.bits",
        hint="rows of 4 bits have multiples of 32 columns, those of 8 bits 16 or more",
    )


def transform_of(model: nn.Module, settings: QuantSettings) -> ModelTransform:
    """``model``, on the meta device and changed in place. Raises ConfigError where nothing of it
    can be rounded."""
    choice = chosen(model, rounding_of(settings))
    if settings.packed:
        return ModelTransform(model, dropped=pack(choice.layers))
    fake(choice.layers)
    return ModelTransform(model, tolerance=TOLERANCE)
