"""Sets how the MoE layers of a model route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apt_plugins.moe.layer import MoELayer


class RoutingControls:
    """Sets ``temperature`` of the routers' scores, ``exploration`` (the scale of the Gumbel noise
    on them) and ``capacity`` of the experts in the MoE layers of one model.

    A value is written only where it changes, and without waiting for the device.
    """

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self.layers = layers
        self._values: dict[str, float] = {}

    def set(self, values: Mapping[str, float | None]) -> None:
        """Set these values by name; None keeps the present one."""
        for name, value in values.items():
            if value is None or value == self._values.get(name):
                continue
            self._values[name] = value
            for layer in self.layers:
                _SETTERS[name](layer, value)


def _set_temperature(layer: MoELayer, value: float) -> None:
    layer.router.temperature.fill_(value)


def _set_exploration(layer: MoELayer, value: float) -> None:
    layer.router.noise.fill_(value)
    layer.router.explores = value > 0


def _set_capacity(layer: MoELayer, value: float) -> None:
    layer.capacity = value


_SETTERS = {
    "temperature": _set_temperature,
    "exploration": _set_exploration,
    "capacity": _set_capacity,
}
