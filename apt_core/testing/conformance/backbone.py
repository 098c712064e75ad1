"""What every backbone must do, with small layers of the core in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apt_core.modeling.layers.attention_mha import MHAProvider
from apt_core.modeling.layers.ffn import SwiGLUProvider
from apt_core.modeling.layers.norm import RMSNormProvider
from apt_core.modeling.masks import document_mask, document_positions, takes_documents
from apt_core.testing.conformance import layers
from apt_core.testing.conformance.checks import Check, LeftOut, here, refusing, require_equal
from apt_core.testing.conformance.places import MarkedEmbedding, MarkedPlaces
from apt_core.types import ModelOutput

DOCUMENTS = [[0, 0, 0, 1, 1, 1, 1, 1], [4, 5, 5, 5, 5, 7, 7, 7]]


def _documents() -> dict[str, Tensor]:
    documents = here(torch.tensor(DOCUMENTS))
    return {"mask": document_mask(documents), "positions": document_positions(documents)}


class _Logits(nn.Module):
    """The model as a layer from ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, **call: Any) -> Tensor:
        return self.model(input_ids, **call).logits


@dataclass(frozen=True)
class Backbone:
    """A provider of backbones, and models of two blocks of it."""

    provider: Any
    vocab_size: int = 48
    d_model: int = 32
    length: int = 8

    def create(self, *, max_seq_len: int = 16, **options: Any) -> nn.Module:
        attention, ffn, norm = MHAProvider(), SwiGLUProvider(), RMSNormProvider()
        blocks = [
            self.provider.create_block(
                attention=attention.create_layer(
                    self.d_model, 2, max_seq_len=max_seq_len, position=MarkedPlaces()
                ),
                ffn=ffn.create_layer(self.d_model, 2 * self.d_model),
                norms=[
                    norm.create_layer(self.d_model) for _ in range(self.provider.norms_per_block)
                ],
                dropout=0.0,
            )
            for _ in range(2)
        ]
        return self.provider.create_model(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            max_seq_len=max_seq_len,
            blocks=blocks,
            final_norm=norm.create_layer(self.d_model),
            **options,
        )

    def build(self, **options: Any) -> nn.Module:
        return layers.built(partial(self.create, **options))

    def logits(self, **options: Any) -> nn.Module:
        return _Logits(self.create(**options))

    def ids(self, length: int | None = None, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        size = (2, self.length if length is None else length)
        return here(torch.randint(self.vocab_size, size, generator=generator))


def backbone_checks(provider: Any) -> list[Check]:
    """The checks of a backbone provider."""
    of = Backbone(provider)
    return [
        Check("builds", lambda: _builds(of)),
        Check("shape", lambda: _shape(of)),
        Check("gradients", lambda: layers.has_gradients(layers.built(of.logits), of.ids())),
        Check("deterministic", lambda: layers.deterministic(of.logits, of.ids())),
        Check("state dict", lambda: layers.loads_state(of.logits, of.ids())),
        Check("meta device", lambda: layers.builds_on_meta(of.logits, of.ids())),
        Check("causal", lambda: _causal(of)),
        Check("packed", lambda: _packed(of)),
        Check("position embedding", lambda: _position_embedding(of)),
        Check("tied embeddings", lambda: _tied_embeddings(of)),
        Check("soft cap", lambda: _soft_cap(of)),
        Check("cache", lambda: _cache(of)),
        Check("long sequences", lambda: _long_sequences(of)),
        Check("autocast", lambda: layers.autocasts(layers.built(of.logits), of.ids())),
        Check("compile", lambda: _packed_too(of, layers.compiles)),
        Check("no host sync", lambda: _packed_too(of, layers.never_waits)),
    ]


def _packed_too(of: Backbone, check: Callable[..., None]) -> None:
    check(layers.built(of.logits), of.ids(), {}, _documents())


def _builds(of: Backbone) -> None:
    of.build()


@torch.no_grad()
def _shape(of: Backbone) -> None:
    model = of.build()
    for length in (1, of.length):
        output = model(of.ids(length))
        assert isinstance(output, ModelOutput), f"{type(output).__name__} is no ModelOutput"
        for name, width in (("logits", of.vocab_size), ("hidden", of.d_model)):
            tensor, shape = getattr(output, name), [2, length, width]
            assert list(tensor.shape) == shape, f"{name} {list(tensor.shape)} should be {shape}"
            assert tensor.isfinite().all(), f"{name} that are not finite"


@torch.no_grad()
def _causal(of: Backbone) -> None:
    """What comes later changes nothing, and neither does another row."""
    model, ids, other = of.build(), of.ids(), of.ids(seed=1)
    for training in (False, True):
        logits = model.train(training)(ids).logits
        for seen in range(1, of.length):
            changed = torch.cat([ids[:, :seen], other[:, seen:]], 1)
            what = f"the logits up to {seen - 1}, with other tokens from {seen} on"
            require_equal(model(changed).logits[:, :seen], logits[:, :seen], what)
        require_equal(model(ids[:1]).logits, logits[:1], "a row without the others")


@torch.no_grad()
def _packed(of: Backbone) -> None:
    model, ids = of.build(), of.ids()
    logits = model(ids, **_documents()).logits
    if takes_documents(model):
        ids_as_mask = {**_documents(), "mask": here(torch.tensor(DOCUMENTS))}
        require_equal(model(ids, **ids_as_mask).logits, logits, "with document ids as the mask")
    for row, documents in enumerate(here(torch.tensor(DOCUMENTS))):
        for document in documents.unique():
            kept = documents == document
            alone = model(ids[row : row + 1, kept]).logits
            require_equal(logits[row : row + 1, kept], alone, "a document packed with others")


@torch.no_grad()
def _position_embedding(of: Backbone) -> None:
    """It is added, and follows the positions that are given."""
    ids, places = of.ids(), here(torch.arange(of.length))
    model = of.build(position=MarkedEmbedding(of.d_model))
    logits = model(ids).logits
    plain = layers.same_weights(model, of.build())
    assert not plain(ids).logits.equal(logits), "the embedding of positions is not used"
    require_equal(model(ids, positions=places).logits, logits, "positions 0..T-1")
    rows = torch.stack([places, places + 3])
    own = model(ids, positions=rows).logits[1:]
    require_equal(own, model(ids[1:], positions=rows[1]).logits, "a row with its positions")


@torch.no_grad()
def _tied_embeddings(of: Backbone) -> None:
    """One matrix of V x D less, and it trains and loads as any model does."""
    tied = partial(of.logits, tie_embeddings=True)
    count = [sum(p.numel() for p in model.parameters()) for model in (of.create(), tied())]
    saved, matrix = count[0] - count[1], of.vocab_size * of.d_model
    assert saved == matrix, f"tie_embeddings saves {saved} parameters, and not {matrix}"
    layers.loads_state(tied, of.ids())
    layers.builds_on_meta(tied, of.ids())


@torch.no_grad()
def _soft_cap(of: Backbone) -> None:
    """Logits far below the cap stay what they are, and none exceeds it."""
    ids, free = of.ids(), of.build()
    logits = free(ids).logits
    largest = logits.abs().max().item()
    for cap in (1000 * largest, 0.5 * largest):
        capped = layers.same_weights(free, of.build(logits_soft_cap=cap))(ids).logits
        if cap > largest:
            require_equal(capped, logits, f"logits of at most {largest:.2g} capped at {cap:.2g}")
        else:
            reached = capped.abs().max().item()
            assert reached <= cap, f"logits of {reached:.2g} under a cap of {cap:.2g}"


@torch.no_grad()
def _cache(of: Backbone) -> None:
    """Decoding with what ``create_caches`` gives is the full forward."""
    model, ids = of.build(), of.ids()
    create = getattr(model, "create_caches", None)
    if create is None or create(of.length) is None:
        raise LeftOut("no create_caches, or None of it: decoding computes everything anew")
    for position in (None, MarkedEmbedding(of.d_model)):
        model = of.build(position=position)
        for sizes in ([1] * of.length, [3, 1, of.length - 4]):
            caches = model.create_caches(of.length)
            pieces = [model(piece, caches=caches).logits for piece in ids.split(sizes, 1)]
            lengths = {cache.length for cache in caches}
            assert lengths == {of.length}, f"caches of {lengths} after {of.length} tokens"
            what = f"fed in pieces of {', '.join(map(str, sizes))} tokens"
            require_equal(torch.cat(pieces, 1), model(ids).logits, what)


@torch.no_grad()
def _long_sequences(of: Backbone) -> None:
    model = of.build(max_seq_len=of.length)
    model(of.ids())
    with refusing("a sequence longer than max_seq_len", "max_seq_len"):
        model(of.ids(of.length + 1))
