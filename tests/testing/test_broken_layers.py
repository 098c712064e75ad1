"""A layer that breaks one promise fails the check of that promise, and no other."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.layers import MHAProvider, RMSNormProvider, RoPEProvider, SwiGLUProvider
from apt_core.modeling.masks import are_documents, check_documents, document_mask
from apt_core.providers import AttentionSupport, Beyond
from apt_core.testing.conformance import checks_of
from apt_core.testing.conformance.places import MarkedPlaces

if TYPE_CHECKING:
    from tests.testing.conftest import FailedChecks


class Wrapped(nn.Module):
    """A layer that does all that it should; a subclass breaks something."""

    def __init__(self, inner: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner, self.dropout = inner, dropout
        self.prepare()

    def prepare(self) -> None:
        pass

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        return self.changed(self.inner(x, **call), x)

    def changed(self, y: Tensor, x: Tensor) -> Tensor:
        return y


class AnotherType(Wrapped):
    def changed(self, y, x):
        return y.double()


class DeadParameter(Wrapped):
    def prepare(self):
        self.dead = nn.Parameter(torch.ones(3))


class DrawsNumbers(Wrapped):
    def changed(self, y, x):
        return y * (1 + 1e-7 * torch.rand_like(y))


class DropsAlways(Wrapped):
    def changed(self, y, x):
        return F.dropout(y, self.dropout, training=True)


class StateOutsideOfTheStateDict(Wrapped):
    def prepare(self):
        self.scale = 1 + random.random()

    def changed(self, y, x):
        return self.scale * y


class TableThatIsNotComputedAgain(Wrapped):
    def prepare(self):
        self.register_buffer("table", torch.ones(1), persistent=False)

    def changed(self, y, x):
        return self.table * y


class AllocatesOnTheCPU(Wrapped):
    def prepare(self):
        self.scale = nn.Parameter(torch.ones(1, device="cpu"))

    def changed(self, y, x):
        return self.scale * y


class MixesRowsInTraining(Wrapped):
    def changed(self, y, x):
        return y + 0.1 * y.mean(0) if self.training else y


class MixesTokensInTraining(Wrapped):
    def changed(self, y, x):
        return y + 0.1 * y.mean(-2, keepdim=True) if self.training else y


class WrongInBF16(Wrapped):
    def changed(self, y, x):
        return 1.2 * y if torch.is_autocast_enabled("cpu") else y


class OverflowsInBF16(Wrapped):
    def changed(self, y, x):
        return y * float("inf") if torch.is_autocast_enabled("cpu") else y


class BreaksTheGraph(Wrapped):
    def changed(self, y, x):
        torch._dynamo.graph_break()
        return y


class ComputesAnotherThingCompiled(Wrapped):
    def changed(self, y, x):
        return 2 * y if torch.compiler.is_compiling() else y


class ReadsAValue(Wrapped):
    def changed(self, y, x):
        return y / max(1.0, x.abs().max().item() / 1e9) if self.training else y


class BranchesOnAValue(Wrapped):
    def changed(self, y, x):
        return y.clamp(max=9) if self.training and y.sum() > 1e9 else y


class SaysAnotherForm(Wrapped):
    """A method of it scales one tensor of the form."""

    def plain(self):
        form = self.inner.plain()
        name = next(name for name in ("out", "down", "weight") if hasattr(form, name))
        return replace(form, **{name: 1.5 * getattr(form, name)})


class KeepsWhatIsDropped(Wrapped):
    def plain(self):
        return self.inner.plain()

    def beyond_plain(self):
        yield Beyond("part", "a part that stays", lambda: None)


COMMON: list[tuple[type[Wrapped], str]] = [
    (AnotherType, "shape"),
    (DeadParameter, "gradients"),
    (DrawsNumbers, "deterministic"),
    (StateOutsideOfTheStateDict, "state dict"),
    (TableThatIsNotComputedAgain, "meta device"),
    (AllocatesOnTheCPU, "meta device"),
    (WrongInBF16, "autocast"),
    (OverflowsInBF16, "autocast"),
    (BreaksTheGraph, "compile"),
    (ComputesAnotherThingCompiled, "compile"),
    (ReadsAValue, "no host sync"),
    (BranchesOnAValue, "no host sync"),
]


# Attention


class Attends(Wrapped):
    def create_cache(self, max_length):
        return self.inner.create_cache(max_length)

    def forward(self, x, *, mask=None, positions=None, cache=None):
        call = self.called(x, mask=mask, positions=positions, cache=cache)
        return self.changed(self.inner(x, **call), x)

    def called(self, x, **call):
        return call


class MHA(MHAProvider):
    """Multi-head attention with ``broken`` around it."""

    broken: type[Wrapped] = Attends

    def create_layer(self, d_model, num_heads, *, dropout=0.0, **options):
        inner = super().create_layer(d_model, num_heads, **options)
        return self.broken(inner, dropout)


class IgnoresPositions(Attends):
    def called(self, x, positions=None, **call):
        return call


class OffByOneInOneForm(Attends):
    def called(self, x, positions=None, **call):
        off = int(positions is not None and positions.ndim == 1)
        return {"positions": None if positions is None else positions + off, **call}


class StartsAgainWithACache(Attends):
    def called(self, x, positions=None, **call):
        return {"positions": torch.arange(x.shape[1]) if positions is None else positions, **call}


class DecodesWithoutEnd(Attends):
    def called(self, x, cache=None, **call):
        self.inner.max_seq_len = 32 if cache is None else 10**9
        return {"cache": cache, **call}


class TakesSequencesOfAnyLength(Attends):
    def prepare(self):
        self.inner.max_seq_len = 10**9


class IgnoresMasks(Attends):
    def called(self, x, mask=None, **call):
        return call


class IgnoresSquareMasks(Attends):
    def called(self, x, mask=None, **call):
        square = mask is not None and mask.shape == (8, 8) and mask.dtype == torch.bool
        return {"mask": None if square else mask, **call}


class TakesNumbersForMasks(Attends):
    def called(self, x, mask=None, **call):
        return {"mask": None if mask is None else mask.bool(), **call}


class MasksTheFirstRowAlike(Attends):
    def called(self, x, mask=None, **call):
        if mask is not None and mask.ndim == 4 and mask.shape[0] == x.shape[0]:
            mask = mask[:1]
        return {"mask": mask, **call}


class NaNWhereNothingIsSeen(Attends):
    def changed(self, y, x):
        return torch.where((y == 0).all(-1, keepdim=True), torch.nan, y)


class LeaksAcrossDocuments(Attends):
    def called(self, x, mask=None, **call):
        by_document = mask is not None and mask.shape == (len(x), 1, 8, 8)
        return {"mask": None if by_document else mask, **call}


class TakesDocuments(Attends):
    """Takes document ids too, of which it makes a boolean mask."""

    takes_documents = True

    def called(self, x, mask=None, cache=None, **call):
        if are_documents(mask):
            held = 0 if cache is None else cache.length
            mask = document_mask(check_documents(mask, len(x), held + x.shape[1]), x.shape[1])
        return {"mask": mask, "cache": cache, **call}


class ForgetsDocumentsWhenDecoding(TakesDocuments):
    def called(self, x, mask=None, cache=None, **call):
        held = 0 if cache is None else cache.length
        call = super().called(x, mask=mask, cache=cache, **call)
        return {**call, "mask": None} if held and are_documents(mask) else call


class TakesAnyDocuments(Attends):
    takes_documents = True

    def called(self, x, mask=None, cache=None, **call):
        if are_documents(mask):
            total = x.shape[1] + (0 if cache is None else cache.length)
            mask = document_mask(mask.reshape(-1)[: total * len(x)].view(-1, total), x.shape[1])
        return {"mask": mask, "cache": cache, **call}


class OneCacheForAll(Attends):
    def create_cache(self, max_length):
        if not hasattr(self, "only"):
            self.only = super().create_cache(max_length)
        return self.only


class IgnoresMasksWhenDecoding(Attends):
    def called(self, x, mask=None, cache=None, **call):
        decoding = cache is not None and cache.length > 0
        return {"mask": None if decoding else mask, "cache": cache, **call}


class ForgetsNothing(Attends):
    def create_cache(self, max_length):
        cache = super().create_cache(max_length)
        cache.truncate = lambda length: None
        return cache


class ForksShareMemory(Attends):
    def create_cache(self, max_length):
        cache = super().create_cache(max_length)
        cache.fork = lambda: copy.copy(cache)
        return cache


class DecodesRowsOtherwise(Attends):
    """Sees the whole span in each row."""

    def rows(self, products):
        inner = self.inner.rows(products)

        def decoding(x, step):
            if step.length == 1:
                step.masked = False
            return inner(x, step)

        return decoding


class SeesTheFuture(Attends):
    def changed(self, y, x):
        return y + 0.01 * x.mean(1, keepdim=True)


class SeesTheFutureByValue(Attends):
    def changed(self, y, x):
        return y + 0.01 * x.detach().mean(1, keepdim=True)


class Windowed(Attends):
    """Sees the last tokens alone, and when it decodes one less of them."""

    less = 0

    def prepare(self):
        self.window = 20

    def called(self, x, mask=None, cache=None, **call):
        held = 0 if cache is None else cache.length
        at = torch.arange(held, held + x.shape[1])[:, None]
        seen = torch.arange(held + x.shape[1])
        near = (seen <= at) & (at - seen < self.window - self.less * (cache is not None))
        whole = mask is None or mask.shape[-1] == len(seen)
        return {"mask": (near if mask is None else near & mask) if whole else mask,
                "cache": cache, **call}  # fmt: skip


class WindowedOneShort(Windowed):
    less = 1


class DecodesSharedHeadsOtherwise(Attends):
    def forward(self, x, *, cache=None, **call):
        shared = cache is not None and self.inner.num_kv_heads < self.inner.num_heads
        return super().forward(x, cache=cache, **call) * (1.1 if shared else 1.0)


class ChangesTheMask(Attends):
    def forward(self, x, *, mask=None, **call):
        y = super().forward(x, mask=mask, **call)
        if mask is not None and mask.all():
            mask[..., -1] = False
        return y


class DrawsByItself(Wrapped):
    def changed(self, y, x):
        return y * (1 + random.random()) if self.training and self.dropout else y


class CountsItsCalls(Wrapped):
    def prepare(self):
        self.calls = 0

    def changed(self, y, x):
        self.calls += self.training and not self.dropout
        return y * (1 + self.calls)


class MixesRowsByValue(Wrapped):
    def changed(self, y, x):
        return y + 0.1 * y.detach().mean(0)


class DropsWhatIsLong(Wrapped):
    def prepare(self):
        self.chunk = 40

    def changed(self, y, x):
        return y + 0.1 * y[:, self.chunk :].sum(1, keepdim=True)


ATTENTION: list[tuple[type[Attends], set[str]]] = [
    (MixesRowsInTraining, {"rows"}),
    (DropsAlways, {"dropout"}),
    (MixesTokensInTraining, {"causal"}),
    (SeesTheFuture, {"causal", "mask", "padding", "packed", "cache", "cache with a mask",
                     "cache truncated", "cache forked"}),
    (SeesTheFutureByValue, {"causal", "padding", "packed", "cache", "cache with a mask",
                            "cache truncated", "cache forked"}),
    (OffByOneInOneForm, {"positions"}),
    (IgnoresPositions, {"positions", "padding", "packed", "cache with a mask"}),
    (StartsAgainWithACache, {"cache", "cache truncated", "cache forked"}),
    (DecodesWithoutEnd, {"long sequences"}),
    (TakesSequencesOfAnyLength, {"long sequences"}),
    (IgnoresSquareMasks, {"mask"}),
    (IgnoresMasks, {"mask", "wrong masks", "padding", "packed", "cache with a mask"}),
    (MasksTheFirstRowAlike, {"mask", "padding", "packed", "cache with a mask"}),
    (TakesNumbersForMasks, {"wrong masks"}),
    (NaNWhereNothingIsSeen, {"padding"}),
    (LeaksAcrossDocuments, {"packed"}),
    (TakesDocuments, set()),
    (TakesAnyDocuments, {"documents"}),
    (ForgetsDocumentsWhenDecoding, {"documents"}),
    (OneCacheForAll, {"cache", "cache forked"}),
    (IgnoresMasksWhenDecoding, {"cache with a mask"}),
    (ForgetsNothing, {"cache truncated"}),
    (ForksShareMemory, {"cache forked"}),
    (DecodesRowsOtherwise, {"rows of a batch"}),
    # Its own mask makes a fitting one of some that do not fit.
    (Windowed, {"wrong masks"}),
    (WindowedOneShort, {"cache", "cache with a mask", "cache truncated", "cache forked",
                        "wrong masks"}),
    (DecodesSharedHeadsOtherwise, {"cache"}),
    (ChangesTheMask, {"mask", "no host sync"}),
    (DrawsByItself, {"dropout"}),
    (CountsItsCalls, {"state dict"}),
    (MixesRowsByValue, {"rows", "positions", "mask", "padding", "packed", "cache with a mask"}),
    (SaysAnotherForm, {"plain form"}),
    (KeepsWhatIsDropped, {"plain form"}),
]  # fmt: skip


def attention(broken: type[Wrapped], **attributes: Any) -> MHA:
    layer = type(broken.__name__, (broken, Attends), {}) if broken is not Attends else Attends
    return type("Provider", (MHA,), {"broken": layer, **attributes})()


def named(value: object) -> str | None:
    return value.__name__ if isinstance(value, type) else None


@pytest.mark.parametrize(("broken", "check"), COMMON, ids=named)
def test_attention_fails_the_check_of_the_promise_that_it_breaks(
    failed_checks: FailedChecks, broken: type[Wrapped], check: str
) -> None:
    assert failed_checks("attention", attention(broken), {check}) == {check}


@pytest.mark.parametrize(("broken", "expected"), ATTENTION, ids=named)
def test_attention_fails_the_checks_of_what_it_breaks(
    failed_checks: FailedChecks, broken: type[Wrapped], expected: set[str]
) -> None:
    assert failed_checks("attention", attention(broken), expected) == expected


class TakesAnyHeads(MHA):
    def create_layer(self, d_model, num_heads, **options):
        if d_model % num_heads:
            return nn.Linear(d_model, 3)
        return super().create_layer(d_model, num_heads, **options)


class IgnoresKVHeads(MHA):
    def create_layer(self, d_model, num_heads, *, num_kv_heads=None, **options):
        shared = num_kv_heads if num_kv_heads in (1, 2) else None
        return super().create_layer(d_model, num_heads, num_kv_heads=shared, **options)


class RefusesWithoutAName(MHA):
    def create_layer(self, d_model, num_heads, *, num_kv_heads=None, **options):
        if num_kv_heads is not None:
            raise ValueError("that many heads cannot be")
        return super().create_layer(d_model, num_heads, **options)


class TellsTwiceTheBytes(MHA):
    def kv_cache_bytes(self, *sizes, **options):
        return 2 * super().kv_cache_bytes(*sizes, **options)


class CostsNothingMore(MHA):
    def flops(self, d_model, num_heads, seq_len, *, num_kv_heads=None):
        return 1000


class DeniesItsCache(MHA):
    supports = AttentionSupport(cache=False)


PROVIDERS: list[tuple[type[MHA], set[str]]] = [
    (TakesAnyHeads, {"uneven heads"}),
    (IgnoresKVHeads, {"shared heads"}),
    (RefusesWithoutAName, {"shared heads"}),
    (TellsTwiceTheBytes, {"cache bytes"}),
    (CostsNothingMore, {"flops"}),
    (DeniesItsCache, {"cache"}),
]


@pytest.mark.parametrize(("provider", "expected"), PROVIDERS, ids=named)
def test_a_provider_of_attention_fails_the_check_of_what_it_breaks(
    failed_checks: FailedChecks, provider: type[MHA], expected: set[str]
) -> None:
    assert failed_checks("attention", provider(), expected) == expected


def test_a_cache_that_is_claimed_and_not_there_is_found(failed_checks: FailedChecks) -> None:
    class WithoutACache(Wrapped):
        pass

    provider = type("Provider", (MHA,), {"broken": WithoutACache})()
    assert failed_checks("attention", provider, set()) == {"cache"}


@pytest.mark.parametrize(("kind", "layer"), [("attention", attention(Attends)), ("norm", None)])
def test_layers_that_share_weights_and_what_changes_its_input_are_found(
    failed_checks: FailedChecks, kind: str, layer: Any
) -> None:
    class InPlace(Wrapped):
        def changed(self, y, x):
            x.data.mul_(1.001)
            return y

    class Provider(type(layer or Norm())):
        def create_layer(self, *shape, **options):
            key = (shape, tuple(options))
            if key not in vars(self):
                vars(self)[key] = super().create_layer(*shape, **options)
            return vars(self)[key]

    assert "builds" in failed_checks(kind, Provider(), set())
    provider = (
        attention(type("A", (InPlace,), {})) if layer else type("N", (Norm,), {"broken": InPlace})()
    )
    assert "shape" in failed_checks(kind, provider, set())


def test_every_check_of_attention_has_a_layer_that_fails_it_alone() -> None:
    alone = {check for _, check in COMMON}
    alone |= {min(checks) for _, checks in [*ATTENTION, *PROVIDERS] if len(checks) == 1}
    names = {check.name for check in checks_of("attention", MHA())}
    assert names - alone == {"builds"}, "without it there is nothing to check"


@pytest.mark.parametrize(
    ("flag", "left_out"),
    [
        ("mask", {"mask", "wrong masks", "padding", "packed", "cache with a mask"}),
        ("autocast", {"autocast"}),
        ("compile", {"compile"}),
    ],
)
def test_what_a_provider_does_not_claim_is_left_out_with_the_reason(
    flag: str, left_out: set[str]
) -> None:
    from apt_core.testing.conformance import LeftOut

    claims = {"cache": True, "compile": False, flag: False}
    provider = attention(Attends, supports=AttentionSupport(**claims))
    reasons = {}
    for check in checks_of("attention", provider):
        try:
            check.run()
        except LeftOut as why:
            reasons[check.name] = str(why)
    always = {"compile", "rows of a batch", "plain form", "documents"}
    assert reasons.keys() == left_out | always
    assert {reasons[name] for name in left_out} == {f"supports.{flag} is False"}


def test_places_are_marked_so_that_an_offset_shows_that_rope_hides() -> None:
    x, places = torch.randn(1, 8, 32), torch.arange(8)
    for position, hidden in ((RoPEProvider(), True), (MarkedPlaces(), False)):
        layer = MHAProvider().create_layer(32, 2, max_seq_len=16, position=position)
        same = torch.allclose(layer(x, positions=places + 1), layer(x), rtol=1e-4, atol=1e-6)
        assert same == hidden


# Feed-forward and norms


class FFN(SwiGLUProvider):
    broken: type[Wrapped] = Wrapped

    def create_layer(self, d_model, d_ff, dropout=0.0):
        return self.broken(super().create_layer(d_model, d_ff), dropout)


class Norm(RMSNormProvider):
    broken: type[Wrapped] = Wrapped

    def create_layer(self, d_model):
        return self.broken(super().create_layer(d_model))


class MixesTokens(Wrapped):
    def changed(self, y, x):
        return y + 0.1 * y.mean(1, keepdim=True)


OWN = {
    "ffn": [
        *COMMON,
        (DropsAlways, "dropout"),
        (MixesTokensInTraining, "token-wise"),
        (MixesRowsInTraining, "token-wise"),
        (MixesTokens, "token-wise"),
        (DrawsByItself, "dropout"),
        (CountsItsCalls, "state dict"),
        (MixesRowsByValue, "token-wise"),
        (DropsWhatIsLong, "token-wise"),
        (SaysAnotherForm, "plain form"),
    ],
    "norm": [
        *COMMON,
        (MixesTokensInTraining, "token-wise"),
        (MixesRowsInTraining, "token-wise"),
        (CountsItsCalls, "state dict"),
        (SaysAnotherForm, "plain form"),
    ],
}
ROWS = [(kind, broken, check) for kind, rows in OWN.items() for broken, check in rows]
PROVIDER_OF: dict[str, Callable[..., Any]] = {"ffn": FFN, "norm": Norm}


@pytest.mark.parametrize(("kind", "broken", "check"), ROWS, ids=named)
def test_a_layer_fails_the_check_of_the_promise_that_it_breaks(
    failed_checks: FailedChecks, kind: str, broken: type[Wrapped], check: str
) -> None:
    provider = type("Provider", (PROVIDER_OF[kind],), {"broken": broken})()
    assert failed_checks(kind, provider, {check}) == {check}


def test_every_check_of_these_has_a_layer_that_fails_it_alone() -> None:
    for kind, rows in OWN.items():
        names = {check.name for check in checks_of(kind, PROVIDER_OF[kind]())}
        assert names - {check for _, check in rows} <= {"builds", "flops"}


def test_a_feed_forward_that_costs_nothing_more_is_found(failed_checks: FailedChecks) -> None:
    class CostsNothingMore(FFN):
        def flops(self, d_model, d_ff, seq_len):
            return 1000

    assert failed_checks("ffn", CostsNothingMore(), set()) == {"flops"}
