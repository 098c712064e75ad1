"""The plain form of a model: what has one, and what is said of what has none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from apt_core.errors import ConfigError
from apt_core.modeling import ModelBuilder
from apt_core.modeling.layers import MultiHeadAttention, RMSNormProvider, SwiGLU
from apt_core.modeling.plain import beyond_plain, drop_beyond, plain_model
from apt_core.providers import PlainFFN

SIZES = {"d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 24, "vocab_size": 40}


def model_of(**settings: Any) -> nn.Module:
    config = {"model": {**SIZES, "max_seq_len": 12, "tva": {"s": 0}, **settings}}
    return ModelBuilder(config).build_model().eval()


def problems_of(model: nn.Module) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plain_model(model)
    return [str(problem) for problem in caught.value.problems]


def test_the_shape_and_the_types_are_those_of_the_weights() -> None:
    model = model_of(attention_name="mha", num_kv_heads=1, tie_embeddings=False).double()
    plain = plain_model(model, vocab_size=33)
    shape = plain.shape
    assert (shape.vocab_size, shape.num_layers, shape.d_ff, shape.max_seq_len) == (33, 2, 24, 12)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (2, 1, 8)
    assert not shape.tied and not shape.qk_norm and not shape.num_experts
    assert plain.head is not None and plain.head.shape == plain.embedding.shape == (33, 16)
    blocks = [*plain.blocks()]
    assert len(blocks) == 2 and blocks[0].attention.k.shape == (8, 16)
    assert plain.embedding.dtype == blocks[1].attention.out.dtype == torch.float32


BEYOND = {
    "compensator": {"tva": {"s": 1}},
    "soft_cap": {"logits_soft_cap": 20.0},
    "ngram": {"ngram": {"orders": (2,), "buckets": (8,)}},
}


def test_what_is_beyond_a_plain_form_is_named_and_can_be_dropped() -> None:
    settings = {key: value for each in BEYOND.values() for key, value in each.items()}
    model = model_of(**settings, embedding_norm=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    told = problems_of(model)
    assert len(told) == 3
    assert told[2].startswith("blocks.0.attention (and 1 more): TVA's compensator adds")
    for name in BEYOND:
        assert any(f"--drop {name} leaves it out" in each for each in told)
    ids = torch.arange(10)[None]
    before = model(ids).logits
    counts = drop_beyond(model, [*BEYOND])
    assert counts == {"soft_cap": 1, "ngram": 1, "compensator": 2} and not beyond_plain(model)
    assert not torch.allclose(before, model(ids).logits)
    # The norm of the embeddings is in their rows, and the projection keeps its own.
    assert not plain_model(model).shape.tied


def test_names_that_nothing_has_are_not_dropped() -> None:
    with pytest.raises(ConfigError, match=r"has no soft_cop to drop \(did you mean 'soft_cap'"):
        drop_beyond(model_of(logits_soft_cap=2.0), ["soft_cop"])
    with pytest.raises(ConfigError, match="what can be dropped: nothing"):
        drop_beyond(model_of(), ["x"])


class Windowed(MultiHeadAttention):
    def attend(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        return super().attend(q, k, v, mask)


class Renamed(MultiHeadAttention):
    """Changes nothing of what is computed."""

    def extra_repr(self) -> str:
        return "renamed"


def changed(change: Callable[[Any], None], **settings: Any) -> nn.Module:
    model = model_of(**settings)
    change(model)
    return model


def with_attention(kind: type[MultiHeadAttention], model: Any) -> None:
    model.blocks[0].attention.__class__ = kind


def with_other(model: Any) -> None:
    model.blocks[1].ffn = SwiGLU(16, 20)
    model.blocks[1].ffn_norm = RMSNormProvider({"eps": 1e-3}).create_layer(16)


def with_nonsense(model: Any) -> None:
    feed_forward = model.blocks[0].ffn
    feed_forward.__class__ = type("Odd", (SwiGLU,), {"plain": lambda self: self.up.weight})
    wrong = type("Wrong", (SwiGLU,), {"plain": lambda self: PlainFFN(*[self.up.weight] * 3)})
    model.blocks[1].ffn.__class__ = wrong


def replaced_forward(model: Any) -> None:
    layer = model.blocks[0].ffn
    layer.forward = lambda x: x


MHA = {"attention_name": "mha"}


class Twice(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def with_more_around(model: nn.Module) -> None:
    model.embedding = Twice(model.embedding.num_embeddings, 16)
    model.head = nn.Linear(16, model.head.out_features)


REFUSED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "layers without a form, all of them": (
        lambda: model_of(ffn_name="gelu", norm_name="layernorm", position_name="learned"),
        [
            "the model: embeddings of positions are added",
            "blocks.0 (and 1 more): its ffn (GELU) has no plain form (--drop ffn leaves it out)",
            "final_norm: LayerNorm has no plain form",
        ],
    ),
    "in blocks": (
        lambda: model_of(ffn_name="relu2", position_name="none"),
        [
            "blocks.0 (and 1 more): its ffn (SquaredReLU) has no plain form",
            "blocks.0.attention.rotary (and 1 more): there is none",
        ],
    ),
    "a derived class with another kernel": (
        lambda: changed(partial(with_attention, Windowed), **MHA),
        ["blocks.0: its attention (Windowed) has no plain form"],
    ),
    "another forward of one object": (
        lambda: changed(replaced_forward),
        ["blocks.0: its ffn (SwiGLU) has no plain form"],
    ),
    "a hook": (
        lambda: changed(lambda model: model.blocks[1].register_forward_hook(print)),
        ["blocks.1: Block has no plain form"],
    ),
    "an embedding and a head of somebody else": (
        lambda: changed(with_more_around, tie_embeddings=False),
        [
            "embedding: Twice is more than a look-up",
            "head: Linear is more than a product with its weight",
        ],
    ),
    "blocks that differ": (
        lambda: changed(with_other),
        ["blocks.1.norms: their eps are 1e-08, 0.001, and a plain model has one"],
    ),
    "sizes that differ": (
        lambda: changed(lambda model: setattr(model.blocks[1], "ffn", SwiGLU(16, 20))),
        ["blocks.1: its d_ff is 20, that of blocks.0 is 24: a plain model has one for all"],
    ),
    "forms that are none": (
        lambda: changed(with_nonsense),
        [
            "blocks.0.ffn: the plain() of Odd gives a Parameter",
            "blocks.1.ffn.down: its plain form has [24, 16] in place of [16, 24]",
        ],
    ),
    "no model at all": (lambda: nn.Linear(2, 2), ["the model: Linear has no plain form"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_plain_form_is_refused_with_its_place(case: str) -> None:
    make, expected = REFUSED[case]
    told = problems_of(make())
    assert len(told) == len(expected), told
    assert all(one.startswith(other) for one, other in zip(told, expected, strict=True)), told


def test_layers_without_a_form_can_be_left_out_of_blocks_beside_others() -> None:
    model = changed(partial(with_attention, Windowed), **MHA, num_kv_heads=1)
    model.blocks[1].ffn = nn.Identity()
    ids = torch.arange(10)[None]
    before = model(ids).logits
    assert drop_beyond(model, ["attention", "ffn"]) == {"attention": 1, "ffn": 1}
    plain = plain_model(model)
    first, second = plain.blocks()
    assert first.attention.out.shape == (16, 16) and not first.attention.out.any()
    assert first.attention.k.shape == (8, 16) and second.attention.out.any()
    assert second.ffn.down.shape == (16, 24) and not second.ffn.down.any()
    assert not torch.allclose(before, model(ids).logits)
    drop_all = changed(partial(with_attention, Windowed), **{**MHA, "num_layers": 1})
    drop_beyond(drop_all, ["attention"])
    assert problems_of(drop_all) == ["the model: there is no attention left in any block"]


def test_a_derived_class_that_computes_the_same_keeps_its_form() -> None:
    assert plain_model(changed(partial(with_attention, Renamed), **MHA)).shape.num_layers == 2
