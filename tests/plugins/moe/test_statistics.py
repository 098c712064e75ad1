"""Loads, losses and figures of the experts against counting one assignment at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from apt_core.data.batches import Batch
from apt_core.data.packing.rows import IGNORED
from apt_plugins.moe import statistics
from apt_plugins.moe.settings import MoeSettings

LAYERS, GROUPS, EXPERTS, TOP_K = 3, 2, 5, 2
SHAPE = (4, 6)
TOKENS = SHAPE[0] * SHAPE[1]


def stub_layer(*, capacity=None, seed=0, groups=GROUPS, experts=EXPERTS, tokens=TOKENS):
    """What a forward in training leaves behind."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, groups * experts, generator=rng)
    grouped = logits.unflatten(-1, (groups, experts))
    chosen = grouped.topk(TOP_K).indices
    indices = (chosen + experts * torch.arange(groups)[:, None]).flatten(1)
    kept = None if capacity is None else torch.rand(indices.shape, generator=rng) < 0.7
    return SimpleNamespace(
        granularity=groups,
        num_experts=experts,
        top_k=TOP_K,
        capacity=capacity,
        indices=indices,
        kept=kept,
        load=torch.zeros(groups * experts),
        dropped=torch.zeros(()),
        router=SimpleNamespace(
            logits=logits.requires_grad_(),
            probabilities=grouped.detach().softmax(-1).flatten(1).requires_grad_(),
        ),
    )


def stub_batch(padded=0, prompt=0):
    """The first ``prompt`` tokens have no target, the last ``padded`` positions no token."""
    targets = torch.arange(TOKENS).reshape(SHAPE)
    is_token = torch.ones(SHAPE, dtype=torch.bool)
    targets.view(-1)[TOKENS - padded :] = IGNORED
    targets.view(-1)[:prompt] = IGNORED
    is_token.view(-1)[TOKENS - padded :] = False
    return Batch(
        torch.zeros_like(targets),
        targets,
        max(0, TOKENS - padded - prompt),
        num_tokens=TOKENS - padded,
        is_token=is_token,
    )


@pytest.fixture
def layers():
    return [stub_layer(capacity=1.0, seed=seed) for seed in range(LAYERS)]


SETTINGS = MoeSettings(balance_loss=0.5, z_loss=0.25)


def test_loads_and_drops_are_those_of_tokens_and_add_up(layers):
    """Those of prompts too, which take places of experts."""
    statistics.start_counting(layers)
    batches = [stub_batch(padded=7), stub_batch(), stub_batch(padded=3, prompt=9)]
    for batch in batches:
        statistics.losses(layers, batch, SETTINGS)
    for layer in layers:
        load, dropped = [0] * (GROUPS * EXPERTS), 0
        for batch in batches:
            for token, counted in enumerate(batch.is_token.flatten().tolist()):
                for slot in range(GROUPS * TOP_K):
                    if counted:
                        load[int(layer.indices[token, slot])] += 1
                        dropped += not layer.kept[token, slot]
        assert layer.load.tolist() == load
        assert layer.dropped.item() == dropped
    statistics.start_counting(layers)
    assert not any(layer.load.any() or layer.dropped for layer in layers)


@pytest.mark.parametrize(("padded", "prompt"), [(0, 0), (7, 0), (7, 5)])
def test_the_losses_are_their_formulas(layers, padded, prompt):
    batch = stub_batch(padded, prompt)
    terms = statistics.losses(layers, batch, SETTINGS)
    balance = z = 0.0
    counted = range(TOKENS - padded)
    for layer in layers:
        for group in range(GROUPS):
            experts = range(group * EXPERTS, (group + 1) * EXPERTS)
            for expert in experts:
                sent = sum(layer.indices[token].tolist().count(expert) for token in counted)
                share = sent / (len(counted) * TOP_K)
                mean = sum(layer.router.probabilities[t, expert].item() for t in counted)
                balance += EXPERTS * share * mean / len(counted)
            for token in counted:
                terms_of_token = [math.exp(layer.router.logits[token, e].item()) for e in experts]
                z += math.log(sum(terms_of_token)) ** 2 / len(counted)
    assert terms["balance"].item() == pytest.approx(0.5 * balance / (LAYERS * GROUPS), rel=1e-5)
    assert terms["z"].item() == pytest.approx(0.25 * z / (LAYERS * GROUPS), rel=1e-5)


def test_gradients_reach_the_router_from_tokens_alone(layers):
    terms = statistics.losses(layers, stub_batch(padded=7, prompt=3), SETTINGS)
    (terms["balance"] + terms["z"]).backward()
    for layer in layers:
        for tensor in (layer.router.probabilities, layer.router.logits):
            assert tensor.grad[: TOKENS - 7].abs().sum(1).all()
            assert not tensor.grad[TOKENS - 7 :].any()


def test_the_balancing_loss_is_its_weight_where_the_load_is_even():
    layer = stub_layer(tokens=TOKENS)
    with torch.no_grad():
        layer.router.probabilities.fill_(1 / EXPERTS)
    terms = statistics.losses([layer], stub_batch(), SETTINGS)
    assert terms["balance"].item() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({"balance_loss": 0.0}, {"z"}),
        ({"z_loss": 0.0}, {"balance"}),
        ({"balance_loss": 0.0, "z_loss": 0.0}, set()),
    ],
)
def test_a_loss_of_weight_0_is_left_out_and_loads_are_counted(layers, settings, terms):
    assert set(statistics.losses(layers, stub_batch(), MoeSettings(**settings))) == terms
    assert all(layer.load.sum() == TOKENS * GROUPS * TOP_K for layer in layers)


def test_a_micro_batch_of_padding_counts_nothing(layers):
    assert statistics.losses(layers, stub_batch(padded=TOKENS), SETTINGS) == {}
    assert not any(layer.load.any() for layer in layers)


def test_layers_without_a_capacity_drop_nothing():
    layers = [stub_layer(capacity=capacity, seed=3) for capacity in (None, 1.0)]
    statistics.losses(layers, stub_batch(), SETTINGS)
    assert layers[0].dropped.item() == 0
    assert layers[1].dropped.item() == (~layers[1].kept).sum().item() > 0


def test_nothing_in_a_step_waits_for_the_device():
    # A tensor without data raises where a number is read from it.
    with FakeTensorMode(allow_non_fake_inputs=True):
        layers = [stub_layer(capacity=1.0)]
        statistics.start_counting(layers)
        ids = torch.zeros(SHAPE, dtype=torch.int64)
        batch = Batch(ids, ids, TOKENS - 1)
        terms = statistics.losses(layers, batch, SETTINGS)
        assert set(terms) == {"balance", "z"}


def test_processes_sum_their_counts_in_one_message(layers, monkeypatch):
    messages = []

    def all_reduce(message):
        messages.append(message.clone())
        message.mul_(3)

    monkeypatch.setattr(statistics.dist, "all_reduce", all_reduce)
    statistics.losses(layers, stub_batch(), SETTINGS)
    before = [(layer.load.clone(), layer.dropped.clone()) for layer in layers]
    statistics.sum_over_processes(layers)
    assert len(messages) == 1
    for layer, (load, dropped) in zip(layers, before, strict=True):
        assert layer.load.equal(3 * load)
        assert layer.dropped.equal(3 * dropped)


# Figures ---------------------------------------------------------------------------------------


def with_loads(*loads, dropped=0.0):
    return [
        SimpleNamespace(
            num_experts=len(load) // 2,
            load=torch.tensor(load, dtype=torch.float32),
            dropped=torch.tensor(float(dropped)),
        )
        for load in loads
    ]


def test_an_even_load_has_no_violation_and_full_entropy():
    figures = statistics.figures(with_loads([10.0] * 8, [20.0] * 8))
    assert figures == {
        "max_violation": 0.0,
        "max_violation_mean": 0.0,
        "load_entropy": pytest.approx(1.0),
        "drop_rate": 0.0,
        **dict.fromkeys(("load_min", "load_p25", "load_p50", "load_p75", "load_max"), 1.0),
    }


def test_figures_are_within_groups():
    # Two groups of four experts: one even, one that sends all to its first expert.
    figures = statistics.figures(with_loads([5.0, 5, 5, 5, 20, 0, 0, 0], dropped=10))
    assert figures["max_violation"] == pytest.approx(3.0)
    assert figures["max_violation_mean"] == pytest.approx(1.5)
    assert figures["load_entropy"] == pytest.approx(0.5)
    assert figures["drop_rate"] == pytest.approx(0.25)
    assert (figures["load_min"], figures["load_p50"], figures["load_max"]) == (0.0, 1.0, 4.0)


def test_one_expert_alone_is_balanced():
    figures = statistics.figures(with_loads([7.0, 7.0]))
    assert (figures["load_entropy"], figures["max_violation"]) == (1.0, 0.0)


def test_before_anything_is_counted_there_are_no_figures():
    assert statistics.figures(with_loads([0.0] * 4)) == {}
