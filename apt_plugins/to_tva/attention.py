"""Makes the transform from multi-head attention to TVA.

Shapes: D d_model, H query heads, K key heads, N = H + 2K, d_h the width of a head, R the rank, W
the width D/H that TVA's heads have before they are compressed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apt_core import ConfigError
from apt_core.config import Config
from apt_core.modeling import Carried, ModelBuilder, ModelTransform
from apt_core.modeling.blocks import block_stack
from apt_core.modeling.layers import MultiHeadAttention
from apt_core.modeling.to_tva import Heads, converted, drawn
from apt_plugins.to_tva.settings import rank_of, settings_of

if TYPE_CHECKING:
    from apt_core.types import ProviderSource

QUERIES_AND_MORE = ("qkv_weight", "out_weight")
NORMS = ("q_norm.weight", "k_norm.weight")


def with_tva(model: nn.Module, config: Config, registry: ProviderSource) -> ModelTransform:
    """``model``, on the meta device and changed in place, with TVA in the place of every ``mha``.

    Raises ConfigError if it has none, or a layer of another class under that name.
    """
    rank, settings = rank_of(config), settings_after(config)
    after = config.model_copy(update={"model": config.model.model_copy(update=settings)})
    builder = ModelBuilder(after, registry)
    stack, blocks = block_stack(model)
    names = ModelBuilder(config, registry).attention_names()
    origins: dict[str, Carried] = {}
    lossy = False
    for number, (block, asked) in enumerate(zip(blocks, names, strict=True)):
        if asked != "mha":
            continue
        layer = getattr(block, "attention", block)
        if type(layer) is not MultiHeadAttention:
            raise ConfigError(
                f"{stack}.{number} has a {type(layer).__name__}, of which no way to TVA is known",
                key="to_tva",
                hint="leave out the plugin that has changed it, or this one",
            )
        block.attention = builder.build_block(number).attention
        lossy = lossy or rank < layer.width
        rules = _Layer.of(f"{stack}.{number}", block, layer, rank, config)
        origins.update(rules.origins())
    tolerance = settings_of(config).tolerance if lossy else None
    return ModelTransform(
        model,
        origins,
        tolerance=1e-5 if tolerance is None else tolerance,
        model_settings=settings,
    )


def settings_after(config: Config) -> dict[str, Any]:
    """The settings of ``model`` with TVA of the rank."""
    model = config.model
    tva = {
        "rank": rank_of(config),
        "qk_norm": model.mha.qk_norm,
        "qk_norm_eps": model.mha.qk_norm_eps,
    }
    names = [name if name != "mha" else "tva_default" for name in model.attention_names]
    settings: dict[str, Any] = {"tva": model.tva.model_copy(update=tva)}
    if model.attention_pattern is None:
        return {**settings, "attention_name": names[0]}
    return {**settings, "attention_pattern": tuple(names)}


@dataclass(frozen=True)
class _Layer:
    """The rules of the attention of the block at ``place``; ``scale`` names the weight of the norm
    before it, if it has one."""

    place: str
    rank: int
    heads: Heads
    width: int
    qk_norm: bool
    scale: str | None
    seed: int

    @classmethod
    def of(
        cls, place: str, block: nn.Module, layer: MultiHeadAttention, rank: int, config: Config
    ) -> _Layer:
        norm = getattr(block, "attention_norm", None)
        return cls(
            place,
            rank,
            Heads(
                layer.num_heads,
                layer.num_kv_heads,
                layer.head_dim,
                config.model.rope,
                config.seq_len,
            ),
            width=layer.d_model // layer.num_heads,
            qk_norm=layer.q_norm is not None,
            scale=f"{place}.attention_norm.weight" if isinstance(norm, nn.RMSNorm) else None,
            seed=config.training.seed,
        )

    def origins(self) -> Iterator[tuple[str, Carried]]:
        exact = self.rank == self.heads.head_dim
        names = [f"{self.place}.attention.{name}" for name in QUERIES_AND_MORE]
        if exact:
            yield names[0], self._turned(names[0], self._packed)
            yield names[1], self._turned(names[1], self._read_out)
            return
        norms = [f"{self.place}.attention.{name}" for name in NORMS] if self.qk_norm else []
        sources = [*names, *norms, *([self.scale] if self.scale else [])]
        for name in [*names, *norms]:
            others = [source for source in sources if source != name]
            yield (
                name,
                Carried(
                    name,
                    _Found(self, sources, name),
                    first_moment=_Begun(self, name, 0.0),
                    second_moment=_Begun(self, name, 1.0),
                    others=tuple(others),
                ),
            )

    def _turned(self, name: str, turn: Any) -> Carried:
        """The gradient turns as the weight does; of independent squares the sum counts."""

        def turned(old: Tensor, power: int = 1) -> Tensor:
            dtype = torch.promote_types(old.dtype, torch.float32)
            place = f"{self.place}.attention"
            matrices = drawn(self.rank, self.width, self.seed, place, dtype)
            return turn(old, *(matrix.pow(power) for matrix in matrices))

        return Carried(name, turned, turned, partial(turned, power=2))

    def _packed(self, qkv: Tensor, compress: Tensor, lift: Tensor) -> Tensor:
        """Vᵀ of every head [N*R, D] to [N*W, D]."""
        heads = qkv.unflatten(0, (-1, self.rank))
        return (compress.to(qkv).T @ heads).flatten(0, 1)

    def _read_out(self, out: Tensor, compress: Tensor, lift: Tensor) -> Tensor:
        """[D, H*R] to [D, H*W] by Uᵀ of every head."""
        return (out.unflatten(1, (-1, self.rank)) @ lift.to(out).T).flatten(1)

    def converted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of TVA, by their names in the layer, for those of the old one, by theirs
        in the model. What the norm before it gives counts as of equal mean squares."""
        own = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        place = f"{self.place}.attention"
        norms = tuple(own[f"{place}.{name}"] for name in NORMS) if self.qk_norm else None
        qkv, out = (own[f"{place}.{name}"] for name in QUERIES_AND_MORE)
        squares = qkv.new_ones(qkv.shape[1]) if self.scale is None else own[self.scale].square()
        moment = squares.clamp_min(1e-6 * float(squares.max())).diag()
        sizes = {"width": self.width, "seed": self.seed, "name": place}
        made = converted(qkv, out, norms, moment, self.heads, self.rank, **sizes)
        return {f"{place}.{name}": tensor for name, tensor in made.parameters.items()}


@dataclass(frozen=True, eq=False)
class _Found:
    """A rule: the parameter ``name`` of the converted layer, made of all ``sources``, of which its
    own comes first."""

    layer: _Layer
    sources: list[str]
    name: str

    def __call__(self, own: Tensor, *others: Tensor) -> Tensor:
        rest = iter(others)
        given = {name: own if name == self.name else next(rest) for name in self.sources}
        return self.layer.converted(given)[self.name].to(own)


@dataclass(frozen=True, eq=False)
class _Begun:
    """A rule: moments of a parameter of the converted layer, whose entries are others than before:
    ``factor`` times the mean over the rows of queries, keys or values, or over the columns of
    what reads the heads."""

    layer: _Layer
    name: str
    factor: float

    def __call__(self, old: Tensor) -> Tensor:
        heads, width = self.layer.heads, self.layer.width
        old = old * self.factor
        if self.name.endswith("qkv_weight"):
            numbers = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]
            parts = old.split([number * heads.head_dim for number in numbers])
            means = [part.mean(0, keepdim=True) for part in parts]
            rows = [m.expand(n * width, -1) for m, n in zip(means, numbers, strict=True)]
            return torch.cat(rows)
        if self.name.endswith("out_weight"):
            return old.mean(1, keepdim=True).repeat(1, heads.num_heads * width)
        return old.mean().repeat(self.layer.rank)
