"""A source of providers that needs no plugin manager."""

from __future__ import annotations

from typing import Any

import pytest

from apt_core.modeling.backbones import GPTProvider
from apt_core.modeling.layers import RMSNormProvider, RoPEProvider, SwiGLUProvider, TVAProvider
from apt_core.types import ProviderSpec


class Shelf:
    def __init__(self) -> None:
        self.known: dict[tuple[str, str], ProviderSpec] = {}
        for kind, name, factory, section in (
            ("attention", "tva_default", TVAProvider, "model.tva"),
            ("ffn", "default", SwiGLUProvider, ""),
            ("norm", "rmsnorm", RMSNormProvider, ""),
            ("position", "rope", RoPEProvider, ""),
            ("backbone", "gpt", GPTProvider, ""),
        ):
            self.add(ProviderSpec(kind, name, factory, section=section))

    def add(self, spec: ProviderSpec) -> None:
        self.known[spec.kind, spec.name] = spec

    def get(self, kind: str, name: str, config: Any = None, fallback: bool = True) -> Any:
        return self.known[kind, name].factory(config)

    def specs(self, kind: str | None = None) -> list[ProviderSpec]:
        return [spec for spec in self.known.values() if kind in (None, spec.kind)]


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def tiny() -> dict[str, Any]:
    sizes = {"d_model": 32, "num_heads": 4, "num_layers": 2, "d_ff": 64, "max_seq_len": 24}
    return {"model": {**sizes, "tva": {"r": 2, "s": 1, "tau": 0.2}}, "training": {"seed": 7}}
