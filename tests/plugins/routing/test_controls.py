"""Temperature, exploration and capacity."""

from __future__ import annotations

import pytest
import torch

from apt_core.modeling.carry import call_buffers_loaded
from apt_plugins.routing.controls import RoutingControls


def routed(model, x):
    indices, weights = model[0].router(x)
    order = indices.argsort(-1)
    return indices.gather(1, order), weights.gather(1, order)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_the_temperature_changes_the_weights_and_not_who_is_chosen(
    plugin, make_model, make_trainer, tokens, scores
):
    model, x = make_model(scores=scores, skew=0.4).train(), tokens(64)
    chosen, weights = routed(model, x)
    trainer = make_trainer(model, route_temp=0.25)
    plugin.on_step_start(trainer=trainer)
    colder, sharper = routed(model, x)
    assert colder.equal(chosen)
    assert (sharper.amax(1) > weights.amax(1)).all()
    logits = (x @ model[0].router.weight.t()).gather(1, chosen) / 0.25
    if scores == "softmax":
        torch.testing.assert_close(sharper, logits.softmax(-1))
    # What is evaluated, and sampled from, is the model at that temperature.
    model.eval()
    torch.testing.assert_close(routed(model, x)[1], sharper)


def test_the_temperature_holds_before_the_first_step(plugin, make_model, make_trainer):
    model = make_model()
    plugin.on_training_start(trainer=make_trainer(model, route_temp=1.5))
    assert model[0].router.temperature == 1.5


def test_exploration_draws_experts_by_their_probabilities(plugin, make_model, make_trainer, tokens):
    model = make_model(experts=4, top_k=1, skew=0.8).train()
    plugin.on_training_start(trainer=make_trainer(model, {"exploration": 1.0}, route_temp=2.0))
    x = tokens(1)
    logits = x @ model[0].router.weight.detach().t()
    expected = (logits / 2.0).softmax(-1)[0] * 4000
    torch.manual_seed(3)
    drawn = model[0].router(x.expand(4000, -1))[0].flatten().bincount(minlength=4)
    # 16.27 is the critical value at a level of 0.001 for 3 degrees of freedom.
    assert float(((drawn - expected) ** 2 / expected).sum()) < 16.27


def test_exploration_depends_on_the_seed_of_the_loop_alone(
    plugin, make_model, make_trainer, tokens
):
    model, x = make_model().train(), tokens(64)
    best, _ = routed(model, x)
    plugin.on_training_start(trainer=make_trainer(model, {"exploration": 1.0}))

    def explored(seed):
        torch.manual_seed(seed)
        return routed(model, x)[0]

    first = explored(1)
    assert not first.equal(best)
    assert explored(1).equal(first)
    assert not explored(2).equal(first)
    model.eval()
    assert explored(1).equal(best)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_drawn_without_exploration(plugin, make_model, make_trainer, tokens, training):
    model = make_model().train(training)
    plugin.on_training_start(trainer=make_trainer(model, {"exploration": 0.0}))
    state = torch.get_rng_state()
    model[0].router(tokens(8))
    assert torch.get_rng_state().equal(state)


def test_the_capacity_of_the_schedule_is_that_of_the_layers(
    plugin, make_model, make_trainer, tokens
):
    model = make_model(layers=2, skew=0.8).train()
    trainer = make_trainer(model, moe_capacity=1.5)
    plugin.on_step_start(trainer=trainer)
    assert [layer.capacity for layer in model] == [1.5, 1.5]
    model[0](tokens(64)[None])
    kept = model[0].kept.sum()
    trainer.values["moe_capacity"] = 1.0
    plugin.on_step_start(trainer=trainer)
    assert [layer.capacity for layer in model] == [1.0, 1.0]
    model[0](tokens(64)[None])
    assert model[0].kept.sum() < kept


def test_without_schedules_nothing_is_touched(plugin, make_model, make_trainer):
    model = make_model()
    model[0].capacity = 3.0
    model[0].router.temperature.fill_(0.7)
    plugin.on_training_start(trainer=make_trainer(model))
    plugin.on_step_start(trainer=make_trainer(model))
    assert model[0].capacity == 3.0
    assert model[0].router.temperature == pytest.approx(0.7)
    assert not model[0].router.explores


def test_a_knob_is_turned_only_where_its_value_changes(plugin, make_model, make_trainer):
    model = make_model()
    trainer = make_trainer(model, route_temp=1.5)
    plugin.on_step_start(trainer=trainer)
    model[0].router.temperature.fill_(9.0)
    plugin.on_step_start(trainer=trainer)
    assert model[0].router.temperature == 9.0
    trainer.values["route_temp"] = 1.25
    plugin.on_step_start(trainer=trainer)
    assert model[0].router.temperature == 1.25


def test_a_model_that_has_become_a_mixture_is_set_too(plugin, make_model, make_trainer):
    trainer = make_trainer(torch.nn.Linear(2, 2), {"balancing": "bias"}, route_temp=1.5)
    plugin.on_training_start(trainer=trainer)
    plugin.on_step_start(trainer=trainer)
    plugin.on_step_end(step=1, trainer=trainer)
    trainer.model = make_model()
    plugin.on_step_start(trainer=trainer)
    assert trainer.model[0].router.temperature == 1.5


def test_what_was_set_is_part_of_the_model_and_comes_back_with_it(plugin, make_model, make_trainer):
    """Whoever has set it may be gone by then."""
    trainer = make_trainer(make_model(), {"exploration": 0.5}, route_temp=1.25, moe_capacity=1.42)
    plugin.on_step_start(trainer=trainer)
    trainer.model[0].limited = False
    other = make_model()
    other.load_state_dict(trainer.model.state_dict())
    call_buffers_loaded(other)
    layer, same = other[0], trainer.model[0]
    assert (layer.router.temperature, layer.router.noise) == (1.25, 0.5)
    assert (layer.capacity, layer.limited, layer.router.explores) == (same.capacity, False, True)
    assert layer.capacity == pytest.approx(1.42)


def test_a_resumed_run_keeps_what_the_layers_have_until_its_next_step(
    plugin, make_model, make_trainer
):
    trainer = make_trainer(make_model(), route_temp=1.25)
    trainer.step = 7
    plugin.on_training_start(trainer=trainer)
    assert trainer.model[0].router.temperature == 1.0
    plugin.on_step_start(trainer=trainer)
    assert trainer.model[0].router.temperature == 1.25


def test_a_model_is_not_kept_alive(plugin):
    import gc
    import weakref

    model = torch.nn.Linear(2, 2)
    plugin.controls_of(model)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


def test_a_knob_without_a_value_stays_where_it_was_put(make_model):
    model = make_model()
    controls = RoutingControls(list(model))
    controls.set({"temperature": 1.5, "capacity": None})
    controls.set({"temperature": None})
    assert model[0].router.temperature == 1.5
