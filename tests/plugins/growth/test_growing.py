"""Grown models: equal outputs and gradients, moments, and what cannot grow."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.errors import ConfigError
from apt_core.kernel import Kernel, boot
from apt_core.modeling import ModelBuilder, ModelTransform, generator_for
from apt_core.modeling.carry import materialize
from apt_core.modeling.growth import can_grow
from apt_core.modeling.lr_scale import declared
from apt_core.modeling.structure import base_structure, config_after, transform_of

PLUGINS = ("apt_plugins.growth.plugin", "apt_plugins.moe.plugin")
SIZES = {"d_model": 16, "num_heads": 4, "num_layers": 2, "d_ff": 24, "vocab_size": 40}
WIDE = {"d_model": 24, "d_ff": 32}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    # What the model is, what it grows to, and the transforms in their order.
    "width": ({}, {"d_model": 24}, ("growth",)),
    "width, untied": ({"tie_embeddings": False, "attention_name": "mha"}, WIDE, ("growth",)),
    "units": ({"ffn_name": "gelu", "norm_name": "layernorm"}, {"d_ff": 25}, ("growth",)),
    "heads alone": (
        {"attention_name": "mha", "mha": {"head_dim": 6, "qk_norm": True}},
        {"num_heads": 7},
        ("growth",),
    ),
    "grouped heads": ({"num_kv_heads": 2, "tva": {"qk_norm": True}}, {"d_model": 40}, ("growth",)),
    "all embeddings": (
        {
            "ffn_name": "vft",
            "position_name": "learned",
            "embedding_norm": True,
            "ngram": {"orders": [2], "buckets": [31]},
        },
        WIDE,
        ("growth",),
    ),
    "depth": ({"ffn_name": "relu2"}, {"num_layers": 5}, ("growth",)),
    "depth, initial": (
        {"norm_name": "layernorm", "tva": {"s": 1}},
        {"num_layers": 5, "new_blocks": "initial", "insert_after": [1, 0, 1]},
        ("growth",),
    ),
    "vocabulary": ({"logits_soft_cap": 20.0}, {"vocab_size": 44}, ("growth",)),
    "vocabulary, untied": ({"tie_embeddings": False}, {"vocab_size": 44}, ("growth",)),
    "everything": (
        {"attention_pattern": ["mha", "tva_default"], "tie_embeddings": False},
        {**WIDE, "num_layers": 3, "vocab_size": 44},
        ("growth",),
    ),
    "then experts": ({"moe": {"granularity": 2}}, {**WIDE, "num_layers": 3}, ("growth", "moe")),
    "experts before": (
        {"moe": {"granularity": 2, "shared_expert": "split", "experts": 4, "dropless": True}},
        {**WIDE, "num_layers": 3, "vocab_size": 44},
        ("moe", "growth"),
    ),
    "experts, a silent one": (
        {"moe": {"shared_expert": "zero", "experts": 2, "top_k": 1}, "ffn_name": "gelu"},
        {"d_model": 20, "d_ff": 30},
        ("moe", "growth"),
    ),
}


@dataclass
class Grown:
    """A model in fp64 before and after its growth, whose ``transform`` has made one of the other;
    ``config`` has the sizes after all transforms."""

    kernel: Kernel
    config: Any
    old: nn.Module
    new: nn.Module
    transform: ModelTransform


def booted(
    model: Mapping[str, Any], growth: Mapping[str, Any], *more: Any, **sections: Any
) -> Kernel:
    data = {
        "model": {**SIZES, "max_seq_len": 16, **model},
        "growth": dict(growth),
        "hardware": {"device": "cpu"},
        **sections,
    }
    return boot(data, plugins=[*PLUGINS, *more], files=False)


def made(case: str) -> Grown:
    """Of several transforms the last one is taken whose plugin is growth; one after it is made on
    what has grown."""
    model, growth, plugins = CASES[case]
    kernel = booted(model, growth)
    config, structure, stages = kernel.config, base_structure(kernel), {}
    new = ModelBuilder(config, kernel.registry).build_model().double()
    for plugin in plugins:
        old = copy.deepcopy(new)
        with torch.no_grad():
            for name, parameter in old.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator_for(1, name))
                parameter.add_(0.3 * noise * max(0.1, float(parameter.square().mean().sqrt())))
        transform = transform_of(kernel, plugin, copy.deepcopy(structure), config)
        assert transform is not None
        structure, config = copy.deepcopy(transform.model), config_after(config, transform)
        transform.model.double()
        new = materialize(transform, old, seed=3, num_layers=config.model.num_layers)
        stages[plugin] = Grown(kernel, config, old, new, transform)
    if plugins[-1] == "moe":
        assert config.model.d_ff == growth["d_ff"]
        ids, stage = torch.arange(12)[None], stages["moe"]
        dense, experts = (model.eval()(ids).logits for model in (stage.old, stage.new))
        assert (dense - experts).abs().max() < 1e-10
    return stages["growth"]


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(SIZES["vocab_size"], (3, 13), generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Of the loss over the ids that both have, as the switch compares it."""
    logits = model.eval()(ids[:, :-1]).logits[..., : SIZES["vocab_size"]].flatten(0, 1)
    model.zero_grad()
    F.cross_entropy(logits, ids[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_moments(case: str, ids: Tensor) -> None:
    """In fp64, so that only what is wrong differs. The gradient of an old weight is what the rule
    for the first moment makes of it, and that of the second fits its square."""
    grown = made(case)
    old, new, transform = grown.old, grown.new, grown.transform
    with torch.no_grad():
        before, after = (model.eval()(ids) for model in (old, new))
    common = before.logits.shape[-1]
    assert (after.logits[..., :common] - before.logits).abs().max() < 1e-10
    if common < after.logits.shape[-1]:  # new ids have the mean of the others
        mean = before.logits.mean(-1, keepdim=True).expand_as(after.logits[..., common:])
        if grown.config.model.logits_soft_cap is None:
            assert (after.logits[..., common:] - mean).abs().max() < 1e-10
    was, now = gradients(old, ids), gradients(new, ids)
    known = dict(old.named_parameters())
    seen = set()
    for name, gradient in now.items():
        origin = transform.origin(name, known)
        assert origin is not None
        if origin.source in seen or origin.source not in was:
            continue  # of a new block
        seen.add(origin.source)
        there = origin.first_moment(torch.ones_like(was[origin.source])) != 0
        expected = origin.first_moment(was[origin.source])
        scale = expected.abs().max() + 1e-12
        assert ((gradient - expected)[there]).abs().max() / scale < 1e-8, name
        square = origin.second_moment(was[origin.source].square())
        assert ((square - expected.square())[there]).abs().max() / scale**2 < 1e-8, name
        assert (square[~there] >= 0).all() and torch.isfinite(square).all()
    assert seen >= was.keys() - {"embedding.weight"} or case == "vocabulary"


@pytest.mark.parametrize("case", ["width", "everything", "experts before"])
def test_every_new_weight_learns(case: str, ids: Tensor) -> None:
    """Zeros beside zeros would have no gradient for ever. After some steps nothing new is what it
    was, and new places of the stream are in use."""
    new = made(case).new
    start = {name: p.detach().clone() for name, p in new.named_parameters()}
    optimizer = torch.optim.AdamW(new.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        logits = new(ids[:, :-1]).logits.flatten(0, 1)
        F.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        optimizer.step()
    for name, parameter in new.named_parameters():
        changed = parameter.detach() != start[name]
        if "embedding" in name or "experts" in name:  # ids and experts that nothing chose stay
            assert changed.any()
        else:
            assert changed.all(), f"{name}: {changed.float().mean():.2f}"


@pytest.mark.parametrize("case", ["everything", "width", "heads alone", "all embeddings"])
def test_the_structure_is_that_of_a_model_built_so(case: str) -> None:
    """With the settings that the transform tells, so that plans and rates are those of it."""
    grown = made(case)
    with torch.device("meta"):
        built = ModelBuilder(grown.config, grown.kernel.registry).build_model()
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (grown.new, built)]
    assert shapes[0] == shapes[1]
    eps = [[m.eps for m in model.modules() if hasattr(m, "eps")] for model in (grown.new, built)]
    assert eps[0] == pytest.approx(eps[1])
    assert [type(m) for m in grown.new.modules()] == [type(m) for m in built.modules()]


def test_blocks_go_where_they_are_said_to() -> None:
    grown = made("depth, initial")
    moved = {new: old for new, old in grown.transform.moved.items() if new != old}
    assert moved == {
        "blocks.1": "blocks.0",
        "blocks.2": "blocks.1",
        "blocks.3": "blocks.1",
        "blocks.4": "blocks.1",
    }
    silent = [
        number
        for number, block in enumerate(grown.new.blocks)
        if not any(block.get_parameter(n).any() for n in declared("", block, "writes_stream"))
    ]
    assert silent == [1, 3, 4]


# What cannot grow ----------------------------------------------------------------------------

REFUSED = [
    ({}, {}, "growth", "says no size"),
    ({}, {"d_model": 16}, "growth.d_model", "is what the model has"),
    ({}, {"vocab_size": 30}, "growth.vocab_size", "smaller than now: model.vocab_size is 40"),
    ({}, {"num_layers": 1}, "growth.num_layers", "smaller than now"),
    ({}, {"d_model": 22}, "growth.d_model", "not a multiple of the width of a head, 4"),
    ({}, {"num_heads": 6}, "growth.num_heads", "6 heads of 4, whose width stays, make 24"),
    ({"num_kv_heads": 2}, {"d_model": 20}, "growth.d_model", "share keys and values 2 by 2"),
    ({}, {"num_layers": 4, "insert_after": [1]}, "growth.insert_after", "names 1 places, and 2"),
    ({}, {"num_layers": 3, "insert_after": [2]}, "growth.insert_after", "no block 2: the model"),
    ({}, {"d_ff": 32, "insert_after": [0]}, "growth.insert_after", "and 0 blocks are added"),
    ({}, {"d_ff": "32"}, "growth.d_ff", "must be a whole number"),
    ({}, {"dmodel": 32}, "growth.dmodel", "unknown key"),
]


@pytest.mark.parametrize(("model", "growth", "key", "message"), REFUSED)
def test_bad_input_is_refused_at_once(
    model: dict[str, Any], growth: dict[str, Any], key: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        booted(model, growth)
    told = [p for p in caught.value.problems if p.key == key and message in str(p)]
    assert told, str(caught.value)


STRANGERS = '''
from torch import nn
from apt_core import ProviderSpec, hookimpl
from apt_core.modeling.layers import MultiHeadAttention, SwiGLU
from apt_core.providers import AttentionProvider, FeedForwardProvider

class Doubling(nn.Module):
    """Says nothing of growth."""
    def __init__(self, width):
        super().__init__()
        self.matrix = nn.Linear(width, width, bias=False)
    def forward(self, x, *, mask=None, positions=None, cache=None):
        return self.matrix(x)

class Own(SwiGLU):
    """Computes something else than what it is derived from."""
    def forward(self, x):
        return 2 * super().forward(x)

class Packed(nn.Linear):
    """As a quantised product may be."""
    def forward(self, x):
        return super().forward(x.round())

class DoublingProvider(AttentionProvider):
    name = "doubling"
    def create_layer(self, d_model, num_heads, **options):
        return Doubling(d_model)
    def kv_cache_bytes(self, *args, **options):
        return 0
    def flops(self, d_model, num_heads, seq_len, **options):
        return 0

class OwnProvider(FeedForwardProvider):
    name = "own"
    def create_layer(self, d_model, d_ff, dropout=0.0):
        return Own(d_model, d_ff)

class PackedProvider(FeedForwardProvider):
    name = "packed"
    def create_layer(self, d_model, d_ff, dropout=0.0):
        layer = SwiGLU(d_model, d_ff)
        layer.up = Packed(d_model, d_ff, bias=False)
        return layer

@hookimpl
def apt_register_providers():
    here = __name__
    return [
        ProviderSpec("attention", "doubling", DoublingProvider, "1"),
        ProviderSpec("ffn", "own", OwnProvider, "1"),
        ProviderSpec("ffn", "packed", PackedProvider, "1"),
    ]
'''

LAYERS = [
    ({"attention_name": "doubling"}, {"d_model": 24}, "Doubling has no grow()"),
    ({"attention_name": "doubling"}, {"num_layers": 3}, "Doubling does not name in writes_stream"),
    ({"ffn_name": "own"}, {"d_ff": 32}, "Own has no grow()"),
    ({"ffn_name": "packed"}, {"d_ff": 32}, "Packed is in the place of an nn.Linear"),
    ({"norm_name": "layernorm"}, {"d_model": 24}, "LayerNorm subtracts the mean"),
    ({"tva": {"s": 2}}, {"d_model": 24}, "its compensator (model.tva.s)"),
]


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plugins") / "strangers.py"
    path.write_text(STRANGERS, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("model", "growth", "message"), LAYERS)
def test_layers_that_cannot_grow_are_named(
    model: dict[str, Any], growth: dict[str, Any], message: str, strangers: str
) -> None:
    kernel = booted(model, growth, strangers)
    with pytest.raises(ConfigError) as caught:
        transform_of(kernel, "growth", base_structure(kernel))
    (problem,) = caught.value.problems  # once, not for every block
    assert message in problem.message and "blocks.0" in problem.message
    assert problem.key.startswith("growth.") and problem.hint


def test_layers_that_need_not_change_may_be_anything(strangers: str) -> None:
    for model, growth in (
        ({"attention_name": "doubling"}, {"d_ff": 32}),
        ({"attention_name": "doubling", "ffn_name": "own"}, {"vocab_size": 44}),
    ):
        kernel = booted(model, growth, strangers)
        assert transform_of(kernel, "growth", base_structure(kernel)) is not None


def test_a_layer_that_others_listen_to_does_not_grow() -> None:
    """A hook of theirs may do anything with what it computes."""
    layer = ModelBuilder({"model": SIZES}).build_block()
    assert can_grow(layer)
    layer.register_forward_hook(lambda *_: None)
    assert not can_grow(layer)
