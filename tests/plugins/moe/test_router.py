from __future__ import annotations

import copy
import pickle

import pytest
import torch

from apt_core.kernel import boot
from apt_core.optim.parameter_groups import hidden_matrices
from apt_plugins.moe.router import TopKProvider, TopKRouter

SCORES = ("softmax", "sigmoid")


def router_of(experts=6, top_k=2, **settings):
    router = TopKRouter(8, experts, top_k, **settings).double()
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(1))
    return router


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(40, 8, generator=generator, dtype=torch.float64, requires_grad=True)


def scores_by_hand(router, x):
    logits = x @ router.weight.T / router.temperature
    logits = logits.view(len(x), router.groups, router.num_experts)
    return logits.softmax(-1) if router.scores == "softmax" else logits.sigmoid()


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("groups", [1, 3])
def test_the_largest_scores_are_chosen_and_their_weights_sum_to_one_in_each_group(
    scores, groups, x
):
    router = router_of(scores=scores, groups=groups)
    router.temperature.fill_(1.7)
    indices, weights = router(x)
    values, order = scores_by_hand(router, x).sort(-1, descending=True)
    chosen = order[..., :2] + 6 * torch.arange(groups)[:, None]
    assert torch.equal(indices, chosen.flatten(1))
    expected = values[..., :2] / values[..., :2].sum(-1, keepdim=True)
    torch.testing.assert_close(weights, expected.flatten(1))
    upstream = torch.randn_like(weights)
    wanted = (x, router.weight)
    for found, other in zip(
        torch.autograd.grad(weights, wanted, upstream),
        torch.autograd.grad(expected.flatten(1), wanted, upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, other)


def test_weights_of_scores_too_small_to_be_told_from_zero_are_right():
    router = TopKRouter(1, 3, 2, scores="sigmoid")
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[-201.0], [-200.0], [-300.0]]))
        router.bias.copy_(torch.tensor([0.0, 0.0, -1.0]))
    _, weights = router(torch.ones(1, 1))
    torch.testing.assert_close(weights.sort().values, torch.tensor([[0.26894142, 0.73105858]]))


def test_one_expert_has_the_weight_one_and_the_router_learns(x):
    router = router_of(top_k=1)
    indices, weights = router(x)
    assert torch.equal(weights, torch.ones_like(weights))
    (found,) = torch.autograd.grad(weights.sum(), router.weight)
    chosen = scores_by_hand(router, x)[:, 0].gather(1, indices)
    (expected,) = torch.autograd.grad(chosen.log().sum(), router.weight)
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_bias_changes_the_choice_and_neither_weights_nor_gradients(scores, top_k, x):
    router = router_of(scores=scores, top_k=top_k)
    before, _ = router(x)
    router.bias[3] = 10.0
    after, weights = router(x)
    assert (after == 3).any(1).all() and not (before == 3).any(1).all()
    values = scores_by_hand(router, x)[:, 0].gather(1, after)
    total = values.sum(1, keepdim=True)
    expected = values / (total.detach() if top_k == 1 else total)
    torch.testing.assert_close(weights, expected)
    upstream = torch.randn_like(weights)
    found = torch.autograd.grad(weights, router.weight, upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, router.weight, upstream))


def test_nothing_is_drawn_unless_it_explores_in_training(x):
    router = router_of()
    router.noise.fill_(5.0)
    state = torch.get_rng_state()
    plain, _ = router(x)
    router.explores = True
    assert torch.equal(router.eval()(x)[0], plain)
    assert torch.equal(torch.get_rng_state(), state)
    noisy, weights = router.train()(x)
    assert not torch.equal(noisy, plain)
    values = scores_by_hand(router, x)[:, 0].gather(1, noisy)
    torch.testing.assert_close(weights, values / values.sum(1, keepdim=True))
    router.noise.zero_()
    assert torch.equal(router(x)[0], plain)


@pytest.mark.parametrize("scores", SCORES)
def test_training_leaves_logits_and_probabilities_and_evaluation_leaves_those(scores, x):
    router = router_of(scores=scores, groups=2)
    router(x)
    logits, probabilities = router.logits, router.probabilities
    assert logits.shape == probabilities.shape == (40, 12)
    scored = scores_by_hand(router, x)
    expected = (scored / scored.sum(-1, keepdim=True)).flatten(1)
    torch.testing.assert_close(probabilities, expected)
    (gradient,) = torch.autograd.grad(probabilities[:, 0].sum() + logits.sum(), router.weight)
    assert gradient.abs().max() > 0
    router.eval()(x[:3])
    assert router.logits is logits and router.probabilities is probabilities


def test_it_computes_in_fp32_under_autocast(x):
    router = router_of().float()
    x = x.detach().float()
    expected = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = router(x)
        half = router(x.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert half[1].dtype == torch.float32


def test_it_can_be_copied_after_a_forward(x):
    router = router_of()
    router(x)
    for other in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert other.logits is None and other.probabilities is None
        assert torch.equal(other(x)[1], router(x)[1])


def test_ties_and_what_is_no_number_are_decided_the_same_way_each_time():
    router = router_of()
    with torch.no_grad():
        router.weight.zero_()
    x = torch.zeros(5, 8, dtype=torch.float64)
    x[2] = torch.nan
    first, second = router(x)[0], router(x)[0]
    assert torch.equal(first, second)
    assert all(len(set(row)) == 2 for row in first.tolist())


@pytest.mark.parametrize("top_k", [0, 5])
def test_more_experts_a_token_than_there_are_is_refused_at_once(top_k):
    with pytest.raises(ValueError, match=r"model\.moe\.top_k.*model\.moe\.experts"):
        TopKProvider().create_router(8, 4, top_k)


def test_what_it_is_chosen_by_is_in_checkpoints():
    assert set(router_of().state_dict()) == {"weight", "bias", "temperature", "noise"}


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_an_expert_of_no_score_may_be_chosen_alone(scores):
    """By the bias, where its score is 0 to the last digit."""
    router = router_of(top_k=1, scores=scores)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[0].fill_(-1e4)
        router.bias[0] = 9.0
    x = torch.ones(3, router.weight.shape[1], dtype=router.weight.dtype, requires_grad=True)
    indices, weights = router(x)
    assert (indices == 0).all() and (weights == 1).all()
    assert torch.autograd.grad(weights.sum(), x)[0].isfinite().all()


def test_memory_that_comes_late_is_filled():
    with torch.device("meta"):
        router = TopKRouter(8, 4, 2, groups=3)
    router = router.to_empty(device="cpu")
    router.reset_buffers()
    assert router.offsets.flatten().tolist() == [0, 4, 8]
    assert (router.temperature, router.noise) == (1, 0) and not router.bias.any()


def test_its_rows_are_learned_apart():
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([router_of()])
    assert hidden_matrices(model) == {}


@pytest.mark.parametrize("name", ["topk_moe", "topk_default"])
def test_it_has_two_names(name):
    registry = boot({"plugins": ["apt_plugins.moe.plugin"]}).registry
    provider = registry.get("router", name, {"scores": "sigmoid"}, fallback=False)
    router = provider.create_router(8, 4, 2, groups=2)
    assert (router.scores, router.groups) == ("sigmoid", 2)
