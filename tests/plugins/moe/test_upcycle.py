"""A dense model becomes a mixture of experts: its outputs stay, and so does what Adam knows."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from apt_core import ConfigError
from apt_core.kernel import Kernel, boot
from apt_core.modeling import ModelBuilder
from apt_core.modeling.carry import carry_average, carry_optimizer_state, materialize
from apt_plugins.moe.layer import moe_layers
from apt_plugins.moe.settings import settings_of
from apt_plugins.moe.upcycle import upcycled

PLUGIN = "apt_plugins.moe.plugin"
MODEL = {
    "d_model": 32,
    "num_heads": 2,
    "num_layers": 2,
    "d_ff": 48,
    "vocab_size": 64,
    "max_seq_len": 32,
}
EXPERTS = 4
IDS = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(5))
ADAM = {"exp_avg": 1, "exp_avg_sq": 2}


def kernel_for(ffn: str = "default", *, model: Any = None, **moe: Any) -> Kernel:
    sizes = {**MODEL, "ffn_name": ffn, **(model or {})}
    settings = {"experts": EXPERTS, "dropless": True, **moe}
    return boot({"plugins": [PLUGIN], "model": {**sizes, "moe": settings}})


def loss_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    logits = model(ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def adamw(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.fixture(scope="module")
def trained():
    """``trained(ffn)``: a dense model that has taken a few steps, and its optimizer."""
    made: dict[str, Any] = {}

    def train(ffn: str) -> Any:
        if ffn not in made:
            model = ModelBuilder(kernel_for(ffn).config).build_model()
            optimizer = adamw(model)
            for _ in range(8):
                optimizer.zero_grad()
                loss_of(model).backward()
                optimizer.step()
            made[ffn] = model, optimizer
        return made[ffn]

    return train


@dataclass
class Switched:
    transform: Any
    model: Any
    layers: list[Any]


def switch(dense: Any, kernel: Kernel) -> Switched:
    """``dense`` with experts, as the run would go on with it."""
    config = kernel.config
    with torch.device("meta"):
        structure = ModelBuilder(config, kernel.registry).build_model()
        transform = upcycled(structure, config, settings_of(config), kernel.registry)
    transform.model.to(next(dense.parameters()).dtype)
    transform.check({name: parameter.shape for name, parameter in dense.named_parameters()})
    model = materialize(transform, dense, seed=0, num_layers=config.model.num_layers)
    return Switched(transform, model, moe_layers(model))


FORMS = list(
    itertools.product(
        ("default", "gelu", "relu2"), ("none", "zero", "split"), (1, 2), (1, 2, EXPERTS)
    )
)


@pytest.mark.parametrize(("ffn", "shared", "granularity", "top_k"), FORMS)
def test_no_output_changes(trained, ffn, shared, granularity, top_k):
    dense = trained(ffn)[0]
    kernel = kernel_for(ffn, shared_expert=shared, granularity=granularity, top_k=top_k)
    switched = switch(dense, kernel)
    assert len(switched.layers) == 2
    for training in (False, True):
        switched.model.train(training)
        with torch.no_grad():
            before, after = dense(IDS), switched.model(IDS)
            assert (before.logits - after.logits).abs().max() < 1e-5
            assert abs(loss_of(dense) - loss_of(switched.model)) < 1e-6


# Each activation with each shared expert, with every number of groups and of experts a token.
SOME = [
    (ffn, shared, 1 + (row + column) % 2, (1, 2, EXPERTS)[(row - column) % 3])
    for row, ffn in enumerate(("default", "gelu", "relu2"))
    for column, shared in enumerate(("none", "zero", "split"))
]


@pytest.mark.parametrize("moe", [{"scores": "sigmoid"}, {"symmetry_breaking": False}])
def test_no_output_changes_with(trained, moe):
    dense = trained("default")[0]
    switched = switch(dense, kernel_for(**moe))
    with torch.no_grad():
        assert (dense(IDS).logits - switched.model(IDS).logits).abs().max() < 1e-5


@pytest.mark.parametrize("top_k", [1, 2])
def test_weights_that_are_not_renormalised_change_the_outputs(trained, top_k):
    dense = trained("default")[0].train()
    switched = switch(dense, kernel_for(top_k=top_k))
    for layer in switched.layers:
        router, forward = layer.router, layer.router.forward

        def raw(x, router=router, forward=forward):
            indices, _ = forward(x)
            return indices, router.probabilities.gather(1, indices)

        router.forward = raw
    with torch.no_grad():
        assert abs(loss_of(dense) - loss_of(switched.model)) > 1e-3
        assert (dense(IDS).logits - switched.model(IDS).logits).abs().max() > 1e-2


def test_in_bf16_the_loss_is_what_it_was_to_its_precision(trained):
    dense = trained("default")[0]
    switched = switch(dense, kernel_for(shared_expert="split", granularity=2))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before, after = loss_of(dense), loss_of(switched.model)
    assert abs(before - after) < 0.01 * before


def test_an_average_of_the_weights_gives_the_same_outputs_after_the_switch(trained):
    dense = copy.deepcopy(trained("default")[0])
    average = {name: 0.9 * p.detach() + 0.01 for name, p in dense.named_parameters()}
    switched = switch(dense, kernel_for(granularity=2, shared_expert="zero"))
    carried = carry_average(switched.transform, average, switched.model)
    with torch.no_grad():
        for model, values in ((dense, average), (switched.model, carried)):
            for name, parameter in model.named_parameters():
                parameter.copy_(values[name])
        assert (dense(IDS).logits - switched.model(IDS).logits).abs().max() < 1e-5


# What Adam keeps ------------------------------------------------------------------------------


class Routed(torch.nn.Module):
    """Sends every token of each group to the experts ``first``, ``first`` + 1, … alike. Over all
    ``first`` every expert is as likely as any: the mean is the expectation under a router that
    chooses at random."""

    def __init__(self, layer, first):
        super().__init__()
        self.layer, self.first = [layer], first

    def forward(self, x):
        layer = self.layer[0]
        chosen = (self.first + torch.arange(layer.top_k)) % layer.num_experts
        places = layer.num_experts * torch.arange(layer.granularity)[:, None] + chosen
        indices = places.flatten().expand(len(x), -1).contiguous()
        return indices, torch.full(indices.shape, 1 / layer.top_k, dtype=x.dtype)


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, ids).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def gradients_of_all_routes(switched: Switched, ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    routes = []
    for first in range(EXPERTS):
        for layer in switched.layers:
            layer.router = Routed(layer, first)
        routes.append(gradients(switched.model.eval(), ids))
    return routes


@pytest.mark.parametrize(("ffn", "shared", "granularity", "top_k"), SOME)
def test_the_mean_is_that_of_the_gradient_right_after_the_switch(
    trained, ffn, shared, granularity, top_k
):
    dense = copy.deepcopy(trained(ffn)[0]).double().eval()
    switched = switch(
        dense, kernel_for(ffn, shared_expert=shared, granularity=granularity, top_k=top_k)
    )
    before = gradients(dense, IDS)
    routes = gradients_of_all_routes(switched, IDS)
    for name, origin in switched.transform.origins.items():
        mean = torch.stack([route[name] for route in routes]).mean(0)
        expected = origin.first_moment(before[origin.source])
        torch.testing.assert_close(mean, expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(("ffn", "shared", "granularity", "top_k"), SOME)
def test_the_mean_square_is_that_of_independent_tokens(trained, ffn, shared, granularity, top_k):
    dense = copy.deepcopy(trained(ffn)[0]).double().eval()
    switched = switch(
        dense, kernel_for(ffn, shared_expert=shared, granularity=granularity, top_k=top_k)
    )
    one_token = IDS[:1, :2]
    before = gradients(dense, one_token)
    routes = gradients_of_all_routes(switched, one_token)
    for name, origin in switched.transform.origins.items():
        mean = torch.stack([route[name].square() for route in routes]).mean(0)
        square = before[origin.source].square()
        if shared == "zero" and ".shared." in name and "down" not in name:
            # They have no gradient yet: the scale of the one to come is kept.
            assert not mean.any()
            assert origin.second_moment(square).equal(square)
            continue
        torch.testing.assert_close(mean, origin.second_moment(square), rtol=1e-8, atol=1e-16)


def test_adam_goes_on_with_what_it_knows(trained):
    dense, optimizer = trained("default")
    switched = switch(dense, kernel_for())
    after = adamw(switched.model)
    carry_optimizer_state(switched.transform, dense, optimizer, switched.model, after, ADAM)
    before = {name: optimizer.state[p] for name, p in dense.named_parameters()}
    for name, parameter in switched.model.named_parameters():
        if ".router." in name:
            assert parameter not in after.state
        elif ".experts." in name:
            source = switched.transform.origins[name].source
            assert after.state[parameter]["step"] == before[source]["step"]
            first = slice(0, 1)  # its gauge is 1
            for key, factor in (("exp_avg", 1 / EXPERTS), ("exp_avg_sq", 1 / (2 * EXPERTS))):
                expected = factor * before[source][key][None]
                torch.testing.assert_close(after.state[parameter][key][first], expected)
        else:
            for key, value in before[name].items():
                assert after.state[parameter][key].equal(value)


# Symmetry --------------------------------------------------------------------------------------


def effective(layer: Any) -> torch.Tensor:
    """What each expert computes of its hidden units, whatever their gauge, [E, F]."""
    return layer.experts.up.norm(dim=2) * layer.experts.down.norm(dim=1)


@pytest.mark.parametrize("breaking", [True, False])
def test_experts_that_are_sent_the_same_become_different(trained, breaking):
    dense = trained("default")[0]
    kernel = kernel_for(top_k=EXPERTS, symmetry_breaking=breaking)
    switched = switch(dense, kernel)
    layer = switched.layers[0]
    with torch.no_grad():
        for each in switched.layers:
            each.router.weight.zero_()
        torch.testing.assert_close(effective(layer)[1], effective(layer)[0], rtol=1e-6, atol=0)
    optimizer = adamw(switched.model)
    loss_of(switched.model).backward()
    optimizer.step()
    apart = (effective(layer)[1] / effective(layer)[0] - 1).abs().max()
    assert (apart > 1e-2) == breaking


@pytest.mark.parametrize(("ffn", "gauge"), [("default", 1), ("relu2", 2), ("gelu", 0)])
def test_the_gauge_is_exact_and_leaves_the_first_expert_alone(trained, ffn, gauge):
    dense = trained(ffn)[0]
    layer = switch(dense, kernel_for(ffn)).layers[0]
    old, new = dense.blocks[0].ffn, layer.experts
    assert new.up[0].equal(old.up.weight) and new.down[0].equal(old.down.weight)
    c = new.up[1, :, 0] / old.up.weight[:, 0]
    assert sorted(set(c.tolist())) == ([0.5, 1.0, 2.0] if gauge else [1.0])
    assert new.up[1].equal(c[:, None] * old.up.weight)
    assert new.down[1].equal(old.down.weight / c**gauge)


def test_the_transform_is_a_function_of_the_seed_alone(trained):
    dense = trained("default")[0]
    first = switch(dense, kernel_for()).model.state_dict()
    torch.manual_seed(99)
    second = switch(dense, kernel_for()).model.state_dict()
    assert all(first[name].equal(second[name]) for name in first)


# What it costs ---------------------------------------------------------------------------------


def test_the_plan_knows_what_one_token_passes_through():
    kernel = kernel_for(top_k=2, granularity=2, shared_expert="zero")
    with torch.device("meta"):
        model = ModelBuilder(kernel.config).build_model()
        transform = upcycled(model, kernel.config, settings_of(kernel.config), kernel.registry)
    assert set(transform.active_share.values()) == {2 / EXPERTS}
    assert set(transform.active_share) == {
        f"blocks.{layer}.ffn.experts.{name}" for layer in (0, 1) for name in ("gate", "up", "down")
    }
    # Two experts and the shared one in place of one, and the router, in each of two layers.
    dense, router = 6 * 32 * 48, 2 * 32 * EXPERTS * 2
    assert transform.added_flops == 2 * (2 * dense + router)


# Bad input -------------------------------------------------------------------------------------


def test_a_feed_forward_that_cannot_become_experts_is_bad_input():
    kernel = kernel_for("vft")
    with torch.device("meta"), pytest.raises(ConfigError) as caught:
        model = ModelBuilder(kernel.config, kernel.registry).build_model()
        upcycled(model, kernel.config, settings_of(kernel.config), kernel.registry)
    (problem,) = caught.value.problems
    assert problem.key == "model.ffn_name"
    assert all(word in str(problem) for word in ("'vft'", "blocks.0", "default, gelu or relu2"))


def test_a_layer_that_derives_from_a_known_one_is_not_taken_for_it():
    class Other(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.blocks = torch.nn.ModuleList([block])

    kernel = kernel_for()
    with torch.device("meta"):
        block = ModelBuilder(kernel.config).build_block()
    derived = type("Derived", (type(block.ffn),), {})
    block.ffn.__class__ = derived
    with pytest.raises(ConfigError, match="Derived"):
        upcycled(Other(block), kernel.config, settings_of(kernel.config), kernel.registry)
