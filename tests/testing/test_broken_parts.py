"""What is no layer: a provider that breaks one promise fails that check, and no other."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.modeling.backbones import GPTProvider
from apt_core.modeling.layers import RoPEProvider
from apt_core.modeling.layers.learned import LearnedPositionProvider
from apt_core.optim.lr_schedules import CosineProvider
from apt_core.optim.optimizers.adamw import AdamWProvider
from apt_core.providers import Question, QuestionTask
from apt_core.providers.position import PositionProvider
from apt_core.testing.conformance import CHECKS, checks_of
from apt_core.types import ModelOutput

if TYPE_CHECKING:
    from tests.testing.conftest import FailedChecks

Row = tuple[str, Callable[[], Any], str]
ROWS: list[Row] = []


def breaks(kind: str, check: str) -> Callable[[type], type]:
    """The provider that is decorated fails ``check`` alone."""

    def note(provider: type) -> type:
        ROWS.append((kind, provider, check))
        return provider

    return note


# Positions


class Rotary(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.prepare()

    def prepare(self) -> None:
        pass

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.changed(self.inner(x, positions))

    def changed(self, y: Tensor) -> Tensor:
        return y


def rotary(check: str) -> Callable[[type], type]:
    def note(module: type) -> type:
        class Provider(RoPEProvider):
            def create_rotary(self, head_dim, max_seq_len):
                return module(super().create_rotary(head_dim, max_seq_len))

        Provider.__name__ = module.__name__
        ROWS.append(("position", Provider, check))
        return module

    return note


@rotary("shape")
class AnotherType(Rotary):
    def changed(self, y):
        return y.double()


@rotary("gradients")
class DeadParameter(Rotary):
    def prepare(self):
        self.dead = nn.Parameter(torch.ones(3))


@rotary("deterministic")
class DrawsNumbers(Rotary):
    def changed(self, y):
        return y * (1 + 1e-7 * torch.rand_like(y))


@rotary("state dict")
class StateOutsideOfTheStateDict(Rotary):
    def prepare(self):
        self.scale = 1 + random.random()

    def changed(self, y):
        return self.scale * y


@rotary("meta device")
class TableThatIsNotComputedAgain(Rotary):
    def prepare(self):
        self.register_buffer("table", torch.ones(1), persistent=False)

    def changed(self, y):
        return self.table * y


@rotary("compile")
class BreaksTheGraph(Rotary):
    def changed(self, y):
        torch._dynamo.graph_break()
        return y


@rotary("no host sync")
class ReadsAValue(Rotary):
    def changed(self, y):
        return y / max(1.0, y.abs().max().item() / 1e9) if self.training else y


@rotary("positions")
class OneRowForAll(Rotary):
    def forward(self, x, positions=None):
        return self.inner(x, positions[0] if positions is not None and positions.ndim == 2
                          else positions)  # fmt: skip


@rotary("positions")
class IgnoresPositions(Rotary):
    def forward(self, x, positions=None):
        return self.inner(x)


@rotary("default positions")
class CountsFromOne(Rotary):
    def forward(self, x, positions=None):
        if positions is None and x.shape[1] < self.inner.max_seq_len:
            positions = torch.arange(1, x.shape[1] + 1)
        return self.inner(x, positions)


@rotary("long sequences")
class TurnsRoundAndRound(Rotary):
    def forward(self, x, positions=None):
        if positions is None:
            positions = torch.arange(x.shape[1]) % self.inner.max_seq_len
        pieces = zip(x.split(16, 1), positions.split(16, -1), strict=True)
        return torch.cat([self.inner(piece, places) for piece, places in pieces], 1)


@breaks("position", "shape")
class EmbeddingOfAnotherWidth(LearnedPositionProvider):
    def create_embedding(self, d_model, max_seq_len):
        class Wide(nn.Embedding):
            def forward(self, positions):
                return super().forward(positions).double()

        return Wide(max_seq_len, d_model)


# Backbones


class Model(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.prepare()

    def prepare(self) -> None:
        pass

    def create_caches(self, max_length: int) -> Any:
        return self.inner.create_caches(max_length)

    def forward(self, input_ids: Tensor, **call: Any) -> Any:
        output = self.inner(input_ids, **call)
        return ModelOutput(self.changed(output.logits), output.hidden)

    def changed(self, logits: Tensor) -> Tensor:
        return logits


def model(check: str) -> Callable[[type], type]:
    def note(module: type) -> type:
        class Provider(GPTProvider):
            def create_model(self, **options):
                return module(super().create_model(**options))

        Provider.__name__ = module.__name__
        ROWS.append(("backbone", Provider, check))
        return module

    return note


@model("shape")
class MoreLogitsThanTokens(Model):
    def changed(self, logits):
        return torch.cat([logits, logits[..., -1:]], -1)


for parent, check in (
    (DeadParameter, "gradients"),
    (DrawsNumbers, "deterministic"),
    (BreaksTheGraph, "compile"),
    (ReadsAValue, "no host sync"),
):
    body = {name: value for name, value in vars(parent).items() if name in ("prepare", "changed")}
    model(check)(type(parent.__name__, (Model,), body))


@model("state dict")
class StateOutsideOfTheStateDictWhereUntied(Model):
    def prepare(self):
        self.scale = 1.0 if self.inner.head is None else 1 - 0.01 * random.random()

    def changed(self, logits):
        return self.scale * logits


@model("meta device")
class AllocatesOnTheCPUWhereUntied(Model):
    def prepare(self):
        if self.inner.head is not None:
            self.scale = nn.Buffer(torch.ones(1, device="cpu"))


@model("causal")
class SeesTheFutureInTraining(Model):
    def changed(self, logits):
        return logits + 0.1 * logits.mean(1, keepdim=True) if self.training else logits


@model("packed")
class IgnoresMasks(Model):
    def forward(self, input_ids, *, mask=None, **call):
        return self.inner(input_ids, **call)


@model("long sequences")
class TakesSequencesOfAnyLength(Model):
    def prepare(self):
        for module in (self.inner, *(block.attention for block in self.inner.blocks)):
            module.max_seq_len = 10**9


@model("autocast")
class OverflowsInBF16(Model):
    def changed(self, logits):
        return logits * float("inf") if torch.is_autocast_enabled("cpu") else logits


@model("cache")
class OneSetOfCachesForAll(Model):
    def create_caches(self, max_length):
        if not hasattr(self, "only"):
            self.only = self.inner.create_caches(max_length)
        return self.only


def ignoring(check: str, **ignored: Any) -> None:
    class Provider(GPTProvider):
        def create_model(self, **options):
            return super().create_model(**{**options, **ignored})

    Provider.__name__ = f"Ignores {', '.join(ignored)}"
    ROWS.append(("backbone", Provider, check))


ignoring("position embedding", position=None)
ignoring("tied embeddings", tie_embeddings=False)
ignoring("soft cap", logits_soft_cap=None)


# Tokenizers, optimizers, schedules


@breaks("tokenizer", "builds")
class NoSize(ByteTokenizer):
    vocab_size = 256.0


@breaks("tokenizer", "round trip")
class Normalises(ByteTokenizer):
    def decode(self, ids):
        return super().decode(ids).replace("\r\n", "\n")


@breaks("tokenizer", "ids")
class NumbersOfNumpy(ByteTokenizer):
    def encode(self, text):
        return list(np.array(super().encode(text), dtype=np.int64))


@breaks("tokenizer", "any ids")
class RefusesWhatIsNoText(ByteTokenizer):
    def decode(self, ids):
        return bytes(ids).decode("utf-8")


@breaks("tokenizer", "lone surrogates")
class ReplacesSurrogates(ByteTokenizer):
    def encode(self, text):
        return list(text.encode("utf-8", errors="replace"))


@breaks("tokenizer", "arrays")
class SignedArrays(ByteTokenizer):
    def encode_array(self, text):
        return np.array(self.encode(text), dtype=np.int64)


@breaks("tokenizer", "fingerprint")
class AnotherEveryTime(ByteTokenizer):
    def fingerprint(self):
        self.asked = getattr(self, "asked", 0) + 1
        return str(self.asked)


@breaks("optimizer", "builds")
class HoldsAStranger(AdamWProvider):
    def create(self, param_groups, **rates):
        optimizer = super().create(param_groups, **rates)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": rate})
        return optimizer


@breaks("optimizer", "rates")
class OneRateForAll(AdamWProvider):
    def create(self, param_groups, *, learning_rate, weight_decay):
        groups = [{**group, "lr": learning_rate} for group in param_groups]
        return super().create(groups, learning_rate=learning_rate, weight_decay=weight_decay)


@breaks("optimizer", "step")
class Ascends(AdamWProvider):
    def create(self, param_groups, *, learning_rate, weight_decay):
        groups = [{**group, "maximize": True} for group in param_groups]
        return super().create(groups, learning_rate=learning_rate, weight_decay=weight_decay)


@breaks("optimizer", "no gradient")
class DecaysWhatIsFrozen(AdamWProvider):
    def create(self, param_groups, **rates):
        class Decays(torch.optim.SGD):
            def step(self, closure=None):
                for group in self.param_groups:
                    for weight in group["params"]:
                        weight.data.mul_(1 - group["lr"] * group["weight_decay"])
                super().step(closure)

        return Decays(param_groups, lr=rates["learning_rate"])


@breaks("optimizer", "no gradient")
class MakesAStateOnce(AdamWProvider):
    def create(self, param_groups, **rates):
        class Once(torch.optim.SGD):
            begun = frozenset()

            def step(self, closure=None):
                for group in self.param_groups:
                    for weight in group["params"]:
                        if weight.grad is not None:
                            if weight not in self.begun | self.state.keys():
                                self.state[weight]["mean"] = torch.zeros_like(weight)
                                self.begun |= {weight}
                            mean = self.state[weight]["mean"].lerp_(weight.grad, 0.1)
                            weight.data.sub_(mean, alpha=group["lr"])

        return Once(param_groups, lr=rates["learning_rate"])


@breaks("optimizer", "state dict")
class StateOfItsOwn(AdamWProvider):
    def create(self, param_groups, **rates):
        class Slower(torch.optim.SGD):
            steps = 0

            def step(self, closure=None):
                self.steps += 1
                for group in self.param_groups:
                    for weight in group["params"]:
                        if weight.grad is not None:
                            weight.data.sub_(weight.grad, alpha=group["lr"] / self.steps)

        return Slower(param_groups, lr=rates["learning_rate"])


def schedule(check: str) -> Callable[[Callable[..., float]], Callable[..., float]]:
    def note(change: Callable[..., float]) -> Callable[..., float]:
        class Provider(CosineProvider):
            calls = 0

            def factor(self, step, total_steps, warmup_steps=0, min_ratio=0.0):
                self.calls += 1
                given = super().factor(step, total_steps, warmup_steps, min_ratio)
                return change(given, self.calls, step, total_steps, warmup_steps)

        Provider.__name__ = change.__name__
        ROWS.append(("lr_schedule", Provider, check))
        return change

    return note


@schedule("builds")
def needs_a_warm_up(factor, calls, step, total, warmup):
    return factor if (total, warmup) != (10, 0) else 1 // warmup


@schedule("range")
def negative_past_the_end(factor, calls, step, total, warmup):
    return factor if step <= total else -0.1


@schedule("warm-up")
def rises_halfway(factor, calls, step, total, warmup):
    return factor / 2 if step <= warmup < total else factor


@schedule("end")
def falls_to_zero(factor, calls, step, total, warmup):
    return 0.0 if step == total > warmup else factor


@schedule("pure")
def counts_its_calls(factor, calls, step, total, warmup):
    return factor * (1 - 1e-12 * calls)


class Answers(QuestionTask):
    """A task without faults."""

    def items(self):
        return [Question(f"{self.seed}", "0"), Question("b", "1")]


def task(check: str) -> Callable[[type], type]:
    def note(provider: type) -> type:
        ROWS.append(("task", provider, check))
        return provider

    return note


@task("items")
class IsEmpty(Answers):
    def items(self):
        return []


@task("seed")
class Counts(Answers):
    calls = 0

    def items(self):
        self.calls += 1
        return [Question(f"{self.calls}", "")]


@task("metrics")
class SaysOther(Answers):
    def score(self, item, text):
        return {"exact": 1.0}


@pytest.mark.parametrize(
    ("kind", "provider", "check"), ROWS, ids=lambda value: getattr(value, "__name__", None)
)
def test_what_breaks_one_promise_fails_one_check(
    failed_checks: FailedChecks, kind: str, provider: type, check: str
) -> None:
    assert failed_checks(kind, provider(), {check}) == {check}


@pytest.mark.parametrize("kind", sorted({kind for kind, _, _ in ROWS}))
def test_every_check_has_something_that_fails_it_alone(kind: str) -> None:
    names = {check.name for check in checks_of(kind, object())}
    assert names - {check for of, _, check in ROWS if of == kind} <= {"builds"}


def test_every_kind_with_checks_is_broken_here_or_beside() -> None:
    assert CHECKS.keys() - {kind for kind, _, _ in ROWS} == {
        "attention", "exporter", "ffn", "norm"
    }  # fmt: skip


def test_a_provider_of_positions_gives_some(failed_checks: FailedChecks) -> None:
    failed = failed_checks("position", PositionProvider(), set())
    assert "builds" in failed
