"""The core's providers without a plugin manager, and one table of every attention to be proven.

A later attention is covered by a row in ``ATTENTIONS`` and a formula in ``test_attention.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from torch import nn

from apt_core.defaults import core_providers
from apt_core.modeling import ModelBuilder
from apt_core.modeling.layers import RoPEProvider
from apt_core.types import ProviderSpec


class Shelf:
    """A source of providers as :class:`ModelBuilder` needs it."""

    def __init__(self) -> None:
        self.known = {(spec.kind, spec.name): spec for spec in core_providers("0")}

    def add(self, spec: ProviderSpec) -> None:
        self.known[spec.kind, spec.name] = spec

    def get(self, kind: str, name: str, config: Any = None, fallback: bool = True) -> Any:
        factory = self.known[kind, name].factory
        return (resolve_name(factory) if isinstance(factory, str) else factory)(config)

    def spec(self, kind: str, name: str) -> ProviderSpec:
        return self.known[kind, name]


@torch.no_grad()
def varied(module: nn.Module, seed: int = 0) -> nn.Module:
    """``module`` with every parameter drawn anew, so that none is zero, one, orthonormal or small
    (as the outputs into a fresh stream are), and with its tables in its own precision."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        many = parameter.dim() > 1
        parameter.copy_(value * parameter.shape[-1] ** -0.5 if many else 1 + 0.3 * value)
    for part in module.modules():
        if hasattr(part, "reset_buffers"):
            part.reset_buffers()
    return module


@dataclass(frozen=True)
class Attention:
    """An attention provider of the core with settings; what it builds is :func:`varied`."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_kv_heads: int | None = None

    def __str__(self) -> str:
        given = [f"{key}{'' if value is True else value}" for key, value in self.settings.items()]
        heads = [f"kv{self.num_kv_heads}"] if self.num_kv_heads else []
        return "-".join([self.name, *given, *heads])

    def provider(self) -> Any:
        return Shelf().get("attention", self.name, self.settings)

    def layer(
        self,
        d_model: int = 32,
        num_heads: int = 4,
        *,
        max_seq_len: int = 16,
        dropout: float = 0.0,
        rope: bool = True,
        dtype: torch.dtype = torch.float64,
    ) -> nn.Module:
        built = self.provider().create_layer(
            d_model,
            num_heads,
            max_seq_len=max_seq_len,
            dropout=dropout,
            position=RoPEProvider() if rope else None,
            num_kv_heads=self.num_kv_heads,
        )
        return varied(built.to(dtype))

    def profile(self, **model: Any) -> dict[str, Any]:
        """A small profile with this attention; ``model`` overrides keys of its section model."""
        section = Shelf().known["attention", self.name].section.removeprefix("model.")
        sizes = {"d_model": 32, "num_heads": 4, "num_layers": 2, "d_ff": 48, "max_seq_len": 24}
        chosen = {"attention_name": self.name, "num_kv_heads": self.num_kv_heads}
        return {"model": {**sizes, **chosen, section: dict(self.settings), **model}}

    def block(self, *, dtype: torch.dtype = torch.float64, **model: Any) -> nn.Module:
        return varied(ModelBuilder(self.profile(**model), Shelf()).build_block().to(dtype))

    def model(self, *, dtype: torch.dtype = torch.float64, **model: Any) -> nn.Module:
        built = ModelBuilder(self.profile(**model), Shelf()).build_model()
        return varied(built.to(dtype))


ATTENTIONS = [
    Attention("mha"),
    Attention("mha", {"qk_norm": True}, num_kv_heads=2),
    Attention("mha", num_kv_heads=1),
    Attention("tva_default", {"r": 2, "s": 0}),
    Attention("tva_default", {"r": 2, "s": 0, "qk_norm": True}, num_kv_heads=1),
    Attention("tva_default", {"r": 4, "s": 2}, num_kv_heads=2),
    Attention("tva_default", {"r": 2, "s": 0, "factored": True}),
    Attention("tva_default", {"r": 2, "s": 2, "qk_norm": True, "factored": True}, num_kv_heads=2),
]


@pytest.fixture(params=ATTENTIONS, ids=str)
def attention(request: pytest.FixtureRequest) -> Attention:
    """Each attention of the core, in its variants."""
    return request.param


@pytest.fixture
def attention_of() -> type[Attention]:
    """For a test that needs an attention with settings of its own."""
    return Attention


@pytest.fixture
def autocast_errors() -> Callable[[nn.Module, torch.Tensor], tuple[float, dict[str, float]]]:
    """``(module, x)`` to the relative errors (of norms) of bf16 autocast against fp32: of the
    output, and of the gradients of its mean square to the input (``x``), to each matrix, and to all
    parameters together. A bias alone would say little: its gradient is a sum that may cancel."""

    def run(module: nn.Module, x: torch.Tensor, narrow: bool) -> dict[str, torch.Tensor]:
        given = x.clone().requires_grad_()
        module.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            y = module(given)
        y.float().square().mean().backward()
        found = {name: p.grad for name, p in module.named_parameters()}
        together = torch.cat([gradient.flatten() for gradient in found.values()])
        matrices = {name: gradient for name, gradient in found.items() if gradient.dim() > 1}
        return {"y": y.detach().float(), "x": given.grad, "all": together, **matrices}

    def errors(module: nn.Module, x: torch.Tensor) -> tuple[float, dict[str, float]]:
        wide, narrow = run(module, x, False), run(module, x, True)
        found = {
            name: float((narrow[name] - value).norm() / value.norm())
            for name, value in wide.items()
        }
        return found.pop("y"), found

    return errors


@pytest.fixture
def proven_names() -> set[str]:
    return {row.name for row in ATTENTIONS}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def tiny() -> dict[str, Any]:
    sizes = {"d_model": 32, "num_heads": 4, "num_layers": 2, "d_ff": 64, "max_seq_len": 24}
    return {"model": {**sizes, "tva": {"r": 2, "s": 1, "tau": 0.2}}, "training": {"seed": 7}}
