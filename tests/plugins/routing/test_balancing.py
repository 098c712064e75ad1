"""Balance of the load without a loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from apt_plugins.moe.layer import moe_layers
from apt_plugins.moe.statistics import count, start_counting
from apt_plugins.routing.balancing import move_biases


def counted(layers, step):
    for layer in layers:
        layer.counted_step = step


def max_violations(plugin, trainer, tokens, steps):
    """MaxVio, the largest load over its fair share minus 1 in the worst group, of each of ``steps``
    steps on random tokens, with an optimizer."""
    model = trainer.model
    layers = moe_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    target = 0.3 * torch.randn(16, 16, generator=torch.Generator().manual_seed(9))
    model.train()
    plugin.on_training_start(trainer=trainer)
    violations = []
    for step in range(1, steps + 1):
        start_counting(layers)
        plugin.on_step_start(trainer=trainer)
        x = tokens(512, seed=step)
        loss = F.mse_loss(model(x[None])[0], (x @ target).tanh())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        count(layers, torch.ones(512, dtype=torch.bool))
        counted(layers, step)
        plugin.on_step_end(step=step, trainer=trainer)
        loads = torch.stack([layer.load for layer in layers]).view(-1, layers[0].num_experts)
        violations.append(float((loads.amax(1) / loads.mean(1)).max()) - 1)
    return violations


@pytest.mark.parametrize(
    "shape",
    [
        {"scores": "sigmoid"},
        pytest.param({"scores": "softmax"}, marks=pytest.mark.long),
        {"scores": "sigmoid", "groups": 2},
    ],
    ids=["sigmoid", "softmax", "granular"],
)
def test_a_skewed_router_is_even_within_200_steps_and_without_the_bias_it_is_not(
    plugin, make_model, make_trainer, tokens, shape
):
    balanced = make_trainer(make_model(skew=0.4, **shape), {"balancing": "bias"})
    with_bias = max_violations(plugin, balanced, tokens, 200)
    without = max_violations(plugin, make_trainer(make_model(skew=0.4, **shape)), tokens, 200)
    assert with_bias[0] == without[0] > 1
    assert max(with_bias[-10:]) < 0.3
    assert min(without[-10:]) > 0.6


def test_an_expert_with_too_much_is_made_less_likely_and_the_mean_stays(make_model):
    layers = moe_layers(make_model(layers=2, experts=4, groups=2))
    layers[0].load.copy_(torch.tensor([10.0, 0.0, 4.0, 2.0, 4.0, 4.0, 4.0, 4.0]))
    layers[1].load.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 13.0]))
    move_biases(layers, 1e-3, False)
    # Signs (-1, 1, 0, 1) with a mean of 1/4, and (1, 1, 1, -1) with one of 1/2.
    expected = torch.tensor([-1.25, 0.75, -0.25, 0.75, 0, 0, 0, 0]) * 1e-3
    assert torch.allclose(layers[0].router.bias, expected)
    expected = torch.tensor([0, 0, 0, 0, 0.5, 0.5, 0.5, -1.5]) * 1e-3
    assert torch.allclose(layers[1].router.bias, expected)
    for layer in layers:
        assert layer.router.bias.view(2, 4).mean(1).abs().max() < 1e-9


def test_an_even_load_moves_nothing_whatever_the_number_of_experts(make_model):
    layers = moe_layers(make_model(experts=7))
    layers[0].load.fill_(1000003.0)
    move_biases(layers, 1e-3, False)
    assert not layers[0].router.bias.any()


@pytest.mark.parametrize("void", [True, torch.ones(())], ids=["known", "on the device"])
def test_a_void_step_moves_nothing(plugin, make_model, make_trainer, void):
    model = make_model()
    model[0].load.copy_(torch.arange(8.0))
    counted(model, 1)
    trainer = make_trainer(model, {"balancing": "bias"})
    trainer.step_void = void
    plugin.on_step_end(step=1, trainer=trainer)
    assert not model[0].router.bias.any()
    trainer.step_void = False if void is True else torch.zeros(())
    plugin.on_step_end(step=1, trainer=trainer)
    assert model[0].router.bias.any()


def test_the_rate_is_that_of_the_profile(plugin, make_model, make_trainer):
    model = make_model(experts=2, top_k=1)
    model[0].load.copy_(torch.tensor([3.0, 1.0]))
    trainer = make_trainer(model, {"balancing": "bias", "bias_rate": 0.5})
    counted(model, 4)
    plugin.on_step_end(step=4, trainer=trainer)
    assert model[0].router.bias.tolist() == [-0.5, 0.5]
    # Nobody has counted in this step: what is there is of the one before.
    plugin.on_step_end(step=5, trainer=trainer)
    assert model[0].router.bias.tolist() == [-0.5, 0.5]


def renormalised(router, x, indices, scores):
    """The weights of the chosen experts, by the scores alone."""
    logits = x @ router.weight.t()
    chosen = (logits.sigmoid() if scores == "sigmoid" else logits.softmax(-1)).gather(1, indices)
    return chosen / chosen.sum(-1, keepdim=True)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_gates_and_their_gradients_do_not_depend_on_the_bias(make_model, tokens, scores):
    router, x = make_model(scores=scores)[0].router.train(), tokens(64)
    before, _ = router(x)
    router.bias.copy_(torch.linspace(-0.2, 0.2, 8))
    indices, weights = router(x)
    assert not indices.sort(-1).values.equal(before.sort(-1).values)
    expected = renormalised(router, x, indices, scores)
    torch.testing.assert_close(weights, expected)
    readout = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad((weights * readout).sum(), router.weight)
    (wanted,) = torch.autograd.grad((expected * readout).sum(), router.weight)
    torch.testing.assert_close(got, wanted)
    assert not router.bias.requires_grad


def test_the_bias_is_part_of_the_checkpoint(make_model):
    model = make_model()
    assert "0.router.bias" in model.state_dict()
