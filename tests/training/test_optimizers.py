"""Optimizers, the groups that they are given, and the check before a step."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from apt_core import hookimpl
from apt_core.config import parse_config
from apt_core.config.schema import HardwareSection
from apt_core.modeling import ModelBuilder
from apt_core.modeling.layers import GELU
from apt_core.modeling.lr_scale import learning_rate_scales, undeclared_squares
from apt_core.optim.optimizers.adamw import AdamWProvider
from apt_core.optim.optimizers.muon import MuonProvider
from apt_core.optim.optimizers.newton_schulz import orthogonalize
from apt_core.optim.parameter_groups import hidden_matrices, parameter_groups
from apt_core.plugin_manager import PluginManager
from apt_core.providers.optimizer import MuonSettings
from apt_core.runs.checkpoint_parts import (
    load_optimizer_groups,
    optimizer_groups,
    optimizer_tensors,
)
from apt_core.testing import tiny_run
from apt_core.training.step import finite_guard
from apt_core.training.step.finite_guard import FiniteGuard
from apt_core.training.step.gradients import Gradients

SIZES = {"d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 64, "max_seq_len": 16}
CPU = torch.device("cpu")
IDS = torch.arange(33) * 7 % 61


def build(**settings):
    return ModelBuilder({"model": {**SIZES, "vocab_size": 64, **settings}}).build_model()


def groups_of(model, *plugins, **options):
    manager = PluginManager(strict=True)
    for plugin in plugins:
        manager.register(plugin)
    rates = {"learning_rate": 1e-2, "weight_decay": 0.1}
    return parameter_groups(model, manager, **{**rates, **options})


def optimizer_of(model, provider=None, *plugins, **options):
    provider = provider or MuonProvider()
    options.setdefault("separate_matrices", provider.separates_matrices)
    groups = groups_of(model, *plugins, **options)
    return provider.create(groups, learning_rate=1e-2, weight_decay=0.1)


def loss_of(model):
    return F.cross_entropy(model(IDS[None, :16]).logits[0], IDS[1:17])


def take_steps(model, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
    return loss.item()


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


# Groups


BLOCK = ("attention.qkv_weight", "attention.out_weight", "ffn.up.weight", "ffn.down.weight")


@pytest.mark.parametrize(
    ("settings", "of_a_block"),
    [
        ({"attention_name": "mha", "ffn_name": "gelu"}, BLOCK),
        ({"attention_name": "mha", "ffn_name": "gelu", "tie_embeddings": False}, BLOCK),
        ({"attention_name": "mha", "ffn_name": "gelu", "position_name": "learned"}, BLOCK),
        ({"attention_name": "mha", "ffn_name": "gelu", "mha": {"qk_norm": True}}, BLOCK),
        # As wide as the vocabulary: the shape does not tell a head.
        ({"attention_name": "mha", "ffn_name": "gelu", "vocab_size": 64, "d_ff": 64}, BLOCK),
        ({"ffn_name": "gelu"}, BLOCK),
        ({"ffn_name": "gelu", "tva": {"s": 1}}, (*BLOCK, "attention.compensator.basis")),
        (
            {"attention_name": "mha", "ffn_name": "vft"},
            (*BLOCK, "ffn.gate.weight", "ffn.compress", "ffn.lift"),
        ),
    ],
    ids=str,
)
def test_hidden_matrices_are_those_of_the_blocks(settings, of_a_block):
    expected = {f"blocks.{layer}.{name}" for layer in (0, 1) for name in of_a_block}
    assert set(hidden_matrices(build(**settings))) == expected


FORMS = [
    {"ffn_name": "default", "tva": {"s": 2, "rank": 8}},
    {"ffn_name": "gelu", "attention_name": "mha", "mha": {"qk_norm": True}},
    {"ffn_name": "relu2", "attention_name": "mha", "position_name": "learned"},
    {"ffn_name": "vft", "vft": {"rank": 8}, "ngram": {"orders": [2, 3], "buckets": [48, 48]}},
]
# Of the second no two sizes are equal: width, vocabulary, hidden units, length, heads and theirs.
COINCIDING = {"d_model": 16, "vocab_size": 16, "d_ff": 16, "max_seq_len": 16, "num_heads": 1}
APART = {"d_model": 48, "vocab_size": 80, "d_ff": 112, "max_seq_len": 20, "num_heads": 4}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_a_parameter_is_for_does_not_depend_on_its_size(form):
    models = [build(**{**form, **sizes, "tie_embeddings": False}) for sizes in (COINCIDING, APART)]
    one, other = (
        {name for name, by in learning_rate_scales(m, m.d_model).items() if by == 1536 / m.d_model}
        for m in models
    )
    assert one == other
    assert "head.weight" in one
    assert hidden_matrices(models[0]).keys() == hidden_matrices(models[1]).keys()
    assert not undeclared_squares(models[0], 16)
    compensator = {name.rpartition(".")[2] for name in one if "compensator" in name}
    assert compensator == ({"normal_weight", "gate_weight"} if "tva" in form else set())


def test_a_compensator_is_treated_alike_however_many_directions_it_has():
    found = [hidden_matrices(build(tva={"s": s})).keys() for s in (1, 2)]
    assert found[0] == found[1]


def test_heads_of_one_are_no_matrices():
    """Muon would orthogonalise one row at a time."""
    model = build(attention_name="mha", num_heads=16, position_name="none")
    assert "blocks.0.attention.qkv_weight" not in hidden_matrices(model)


def test_a_role_that_no_layer_tells_is_told_by_none():
    class Wide(nn.Module):
        reads_stream = ("query.weight", "inner.weight")

        def __init__(self):
            super().__init__()
            self.query, self.inner = nn.Linear(8, 8), GELU(8, 8)

    model = nn.ModuleDict({"of": Wide(), "plain": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))})
    with pytest.raises(ValueError, match=r"Wide\.reads_stream names 'inner\.weight', .* inner\.up"):
        learning_rate_scales(model, 8)
    Wide.reads_stream = ("query.weight",)
    assert learning_rate_scales(model, 8).keys() == {
        "of.query.weight", "of.inner.up.weight", "plain.1.weight",
    }  # fmt: skip
    assert undeclared_squares(model, 8) == ["plain.0.weight"]


class ExpertsAndMore(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(4, 6, 3))
        self.kernel = nn.Parameter(torch.zeros(6, 1, 4))
        self.table = nn.Embedding(5, 3)
        self.router = nn.Linear(3, 4)
        self.head = nn.Linear(3, 5)

    elementwise = ("head.weight",)
    stacked = {"experts": 2}  # noqa: RUF012


def test_embeddings_vectors_and_what_a_module_names_elementwise_are_no_hidden_matrices():
    model = nn.Module()
    model.layers = nn.ModuleList([ExpertsAndMore()])
    model.head = nn.Linear(3, 5)
    assert hidden_matrices(model) == {"layers.0.experts": 2, "layers.0.router.weight": 1}


def test_groups_are_as_ever_for_an_optimizer_that_does_not_separate_matrices():
    model = build(ffn_name="gelu")
    scales = {"blocks.0.ffn.up.weight": 4.0}
    groups = groups_of(model, scales=scales)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(g["lr"], g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in groups]
    decayed = [n for n, p in model.named_parameters() if p.ndim >= 2 and n not in scales]
    vectors = [n for n, p in model.named_parameters() if p.ndim < 2]
    assert found == [
        (1e-2, 0.1, decayed),
        (1e-2, 0.0, vectors),
        (4e-2, 0.025, list(scales)),
    ]
    assert all(group.keys() == {"params", "lr", "weight_decay"} for group in groups)


class Asks:
    """A plugin that wants other rates for the first block."""

    @hookimpl
    def apt_param_groups(self, model):
        return [{"params": list(model.blocks[0].parameters()), "lr_scale": 0.5},
                {"params": [model.blocks[1].ffn.up.weight], "weight_decay": 0.3}]  # fmt: skip


def test_rates_of_hidden_matrices_are_the_optimizers_times_what_plugins_ask_for():
    model = build(ffn_name="gelu", attention_name="mha", tie_embeddings=False)
    scales = {"blocks.0.ffn.up.weight": 4.0, "embedding.weight": 2.0}
    settings = {"muon": {"learning_rate": 0.04, "weight_decay": 0.2}}
    optimizer = optimizer_of(model, MuonProvider(settings), Asks(), scales=scales)
    found = {
        id(p): (group["lr"], group["weight_decay"], group["hidden_matrices"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    expected = {
        "blocks.0.ffn.up.weight": (0.02, 0.2, True),
        "blocks.0.ffn_norm.weight": (0.005, 0.0, False),
        "blocks.1.ffn.up.weight": (0.04, 0.3, True),
        "blocks.1.ffn.down.weight": (0.04, 0.2, True),
        "blocks.1.ffn_norm.weight": (0.01, 0.0, False),
        "embedding.weight": (0.02, 0.05, False),
        "head.weight": (0.01, 0.1, False),
    }
    assert {name: found[id(model.get_parameter(name))] for name in expected} == expected
    assert len(found) == len(list(model.parameters()))


class AsksAndSees:
    """A plugin that wants other rates for some matrices and embeddings, sees which rate each step
    really has, and in the last step makes one of them another."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    @hookimpl
    def apt_param_groups(self, model):
        slow = [model.embedding.weight, model.blocks[0].ffn.up.weight]
        return [{"params": slow, "lr_scale": 0.5}]

    @hookimpl
    def on_step_start(self, step, trainer):
        if step == 4:
            names = {id(p): name for name, p in trainer.model.named_parameters()}
            for group in trainer.optimizer.param_groups:
                if "final_norm.weight" in {names[id(p)] for p in group["params"]}:
                    group["initial_lr"] *= 3

    @hookimpl
    def on_step_end(self, step, trainer):
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        self.seen[step] = {
            names[id(p)]: group["lr"]
            for group in trainer.optimizer.param_groups
            for p in group["params"]
        }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_rates_of_all_groups_are_in_the_rows_of_steps(optimizer):
    asking = AsksAndSees()
    overrides = {
        "training.optimizer_name": optimizer,
        "training.learning_rate": 1e-3,
        "training.muon.learning_rate": 0.03,
        "training.warmup_steps": 3,
        "training.min_lr_ratio": 0.5,
    }
    if optimizer == "adamw":
        del overrides["training.muon.learning_rate"]
    run = tiny_run(asking, steps=4, overrides=overrides)
    rows = {row["step"]: row for row in run.metrics if "loss" in row}
    assert list(rows) == [2, 4]
    for step, row in rows.items():
        rates = {name: value for name, value in row.items() if name.split("/")[0] == "lr"}
        seen = asking.seen[step]
        # What the base rate is, is the profile's word: no group need have it.
        factor = row["lr"] / 1e-3
        width = "lr/x96"  # 1536 / 16
        expected = {"lr": 1e-3 * factor, "lr/x0.5": seen["embedding.weight"]}
        up = seen["blocks.0.ffn.up.weight"]
        if optimizer == "adamw":
            expected |= {width: seen["blocks.0.attention.qkv_weight"], "lr/x48": up}
        else:
            expected |= {"lr/matrices": seen["blocks.0.ffn.down.weight"], "lr/matrices_x0.5": up}
            assert expected["lr/matrices"] == pytest.approx(0.03 * factor)
        if step == 4:
            expected["lr/x1"] = seen["final_norm.weight"]
            assert expected["lr/x1"] == pytest.approx(3 * row["lr"])
        assert rates == pytest.approx(expected), step
        assert {f"{rate:.6g}" for rate in seen.values()} <= {f"{r:.6g}" for r in rates.values()}


def test_plugins_choose_parameter_groups():
    class Frozen:
        @hookimpl
        def apt_param_groups(self, model):
            return [{"params": [model.embedding.weight], "lr_scale": 0.0, "weight_decay": 0.0}]

    start, run = tiny_run(Frozen(), steps=1), tiny_run(Frozen(), steps=8)
    assert start.weights["embedding.weight"].equal(run.weights["embedding.weight"])


def test_the_rate_of_matrices_that_read_the_stream_is_scaled_and_of_no_others():
    """With d_ff = d_model every matrix of the feed-forward is square."""
    rates = {}

    class Rates:
        @hookimpl
        def on_training_start(self, trainer):
            names = {id(p): name for name, p in trainer.model.named_parameters()}
            for group in trainer.optimizer.param_groups:
                rates.update((names[id(p)], group["initial_lr"]) for p in group["params"])

    tiny_run(Rates(), steps=1, overrides={"model.d_ff": 16, "training.learning_rate": 1e-4})
    fast = {name.rpartition("blocks.0.")[2] for name, rate in rates.items() if rate > 1e-4}
    assert fast == {"attention.qkv_weight", "ffn.gate.weight", "ffn.up.weight"}
    assert rates["blocks.0.ffn.up.weight"] == pytest.approx(1e-4 * 1536 / 16)


@pytest.mark.parametrize("bad", [{"lr_scale": -1.0}, {"params": [torch.zeros(2)]}, {"lr": 1}])
def test_a_parameter_group_that_cannot_be_used_is_its_plugins_failure(bad):
    class Groups:
        @hookimpl
        def apt_param_groups(self, model):
            return [{"params": list(model.parameters())[:1], **bad}]

    run = tiny_run(Groups(), steps=2, strict=False)
    assert run.manager.records["groups"].state == "quarantined"
    assert run.same_weights(tiny_run(steps=2))


# Muon


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64), (2, 64, 16), (1, 24, 40)], ids=str)
@pytest.mark.parametrize("steps", [5, 6, 12])
def test_singular_values_come_near_1_and_vectors_stay(shape, steps):
    """0.68 to 1.21 are the extremes of the polynomial after five iterations."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, values, v = torch.linalg.svd(matrices, full_matrices=False)
    values = values.clamp_min(0.05 * values.amax(-1, keepdim=True))
    matrices = 1e-3 * u @ torch.diag_embed(values) @ v
    found = u.mT @ orthogonalize(matrices, steps) @ v.mT
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.67 and diagonal.max() < 1.22
    assert (found - torch.diag_embed(diagonal)).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(8, 40), (40, 8)], ids=str)
@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_iterations_on_gram_matrices_are_those_of_the_definition(shape, steps):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = matrix.double() / matrix.double().norm()
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    assert torch.allclose(orthogonalize(matrix[None], steps)[0].double(), x, atol=2e-5)


def test_a_singular_matrix_and_zeros_stay_finite():
    generator = torch.Generator().manual_seed(0)
    matrices = torch.zeros(3, 16, 64)
    matrices[1, 0] = 1.0
    matrices[2] = torch.randn(16, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    for steps in (5, 12, 20):
        found = orthogonalize(matrices, steps)
        assert torch.linalg.matrix_norm(found, 2).max() < 1.22
        assert not found[0].any()


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_step_is_that_of_torchs_muon_computed_in_fp32(nesterov, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    model = build(ffn_name="gelu", attention_name="mha")
    for block in model.blocks:
        block.attention.stacked = {}  # torch's takes every parameter as one matrix
    names = sorted(hidden_matrices(model))
    settings = {"learning_rate": 0.05, "weight_decay": 0.1, "nesterov": nesterov}
    twin = copy.deepcopy(model)
    own = optimizer_of(model, MuonProvider({"muon": settings}))
    torchs = torch.optim.Muon(
        [twin.get_parameter(name) for name in names],
        lr=0.05, weight_decay=0.1, momentum=0.95, nesterov=nesterov,
    )  # fmt: skip
    start = weights_of(model)
    for _ in range(2):
        loss_of(model).backward()
        for name, parameter in twin.named_parameters():
            parameter.grad = model.get_parameter(name).grad
        own.step()
        torchs.step()
    for name in names:
        moved = model.get_parameter(name).detach() - start[name]
        theirs = twin.get_parameter(name).detach() - start[name]
        assert (moved - theirs).norm() < 1e-3 * theirs.norm()


def test_what_is_no_hidden_matrix_steps_as_with_adamw():
    model = build(ffn_name="gelu")
    twin = copy.deepcopy(model)
    muon, adamw = optimizer_of(model), optimizer_of(twin, AdamWProvider())
    for _ in range(3):
        loss_of(model).backward()
        for name, parameter in twin.named_parameters():
            parameter.grad = model.get_parameter(name).grad.clone()
        muon.step()
        adamw.step()
        muon.zero_grad()
    others = dict(twin.named_parameters())
    matrices = hidden_matrices(model)
    for name, parameter in model.named_parameters():
        assert parameter.equal(others[name]) == (name not in matrices), name


@pytest.mark.parametrize("stacked", [1, 2])
def test_a_batch_of_matrices_in_one_parameter_steps_as_each_of_them(stacked):
    generator = torch.Generator().manual_seed(0)
    whole = nn.Parameter(torch.randn(2, 3, 8, 4, generator=generator))
    gradient = torch.randn(2, 3, 8, 4, generator=generator)
    rows = 8 // stacked
    single = [nn.Parameter(part.clone()) for part in whole.detach().view(-1, rows, 4)]
    whole.grad = gradient
    for part, part_gradient in zip(single, gradient.view(-1, rows, 4), strict=True):
        part.grad = part_gradient
    for parameters, count in (([whole], stacked), (single, 1)):
        group = {"params": parameters, "hidden_matrices": True, "stacked": count}
        MuonProvider().create([group], learning_rate=1e-2, weight_decay=0.0).step()
    assert torch.allclose(whole.view(-1, rows, 4), torch.stack(single), atol=1e-6)


def test_parameters_without_a_gradient_stay():
    model = build()
    optimizer, before = optimizer_of(model), weights_of(model)
    loss_of(model).backward()
    model.blocks[0].requires_grad_(False).zero_grad()
    optimizer.step()
    still = {name for name, p in model.named_parameters() if p.equal(before[name])}
    assert still == {f"blocks.0.{name}" for name, _ in model.blocks[0].named_parameters()}


def test_muon_learns_faster_than_adamw_at_its_best_rate():
    ends = []
    for rate in (3e-3, 1e-2, 3e-2):
        model = build(attention_name="mha")
        groups = groups_of(model, learning_rate=rate, weight_decay=0.0)
        adamw = AdamWProvider().create(groups, learning_rate=rate, weight_decay=0.0)
        ends.append(take_steps(model, adamw, 20))
    model = build(attention_name="mha")
    assert take_steps(model, optimizer_of(model), 20) < min(ends)


class Counting(torch.optim.AdamW):
    cleared = 0

    def zero_grad(self, set_to_none=True):
        Counting.cleared += 1
        super().zero_grad(set_to_none)


def test_gradients_are_cleared_as_the_optimizer_does():
    model = torch.nn.Linear(2, 1)
    for optimizer in (torch.optim.AdamW(model.parameters()), Counting(model.parameters())):
        gradients, late = Gradients(optimizer, 1.0), nn.Parameter(torch.ones(1))
        optimizer.add_param_group({"params": [late]})
        (late * model(torch.ones(1, 2))).sum().backward()
        gradients.clear()
        assert [p.grad for p in (*model.parameters(), late)] == [None, None, None]
    assert Counting.cleared == 1


def test_the_state_makes_a_resume_exact():
    """Rates that are written into a group after loading count too."""
    model = build()
    optimizer = optimizer_of(model)
    take_steps(model, optimizer, 3)
    twin = copy.deepcopy(model)
    resumed = optimizer_of(twin)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    load_optimizer_groups(twin, resumed, optimizer_groups(model, optimizer))
    for network, own in ((model, optimizer), (twin, resumed)):
        for group in own.param_groups:
            group["lr"] /= 2
        take_steps(network, own, 2)
    assert same(weights_of(model), weights_of(twin))
    assert same(optimizer_tensors(model, optimizer), optimizer_tensors(twin, resumed))


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_parameters_step_as_whole_ones(mesh):
    model = build()
    sharded = copy.deepcopy(model)
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    own, other = optimizer_of(model), optimizer_of(sharded)
    take_steps(model, own, 3)
    take_steps(sharded, other, 3)
    whole = {name: p.full_tensor() for name, p in sharded.named_parameters()}
    assert same(weights_of(model), whole)
    shards = optimizer_tensors(sharded, other)
    assert all(hasattr(tensor, "full_tensor") for tensor in shards.values() if tensor.ndim)


def test_a_model_without_hidden_matrices_is_refused():
    with pytest.raises(ValueError, match=re.escape("training.optimizer_name: muon")):
        optimizer_of(nn.Linear(4, 4))
    vector = {"params": [nn.Parameter(torch.zeros(3))], "hidden_matrices": True}
    with pytest.raises(ValueError, match="no stack of 1"):
        MuonProvider().create([vector], learning_rate=1.0, weight_decay=0.0)


def test_muons_defaults_are_the_profiles():
    model = build()
    plain, profile = (
        optimizer_of(model, MuonProvider(config))
        for config in (None, parse_config({}).section("training"))
    )
    assert optimizer_groups(model, plain) == optimizer_groups(model, profile)
    group = next(g for g in profile.param_groups if g["hidden_matrices"])
    keys = {"lr" if key == "learning_rate" else key: v for key, v in MuonSettings()}
    assert {key: group[key] for key in keys} == keys


def test_a_run_with_muon_resumes_exactly(tmp_path):
    overrides = {
        "training.optimizer_name": "muon",
        "training.lr_schedule_name": "constant",
        "training.learning_rate": 1e-3,
    }
    tiny_run(output=tmp_path / "run", steps=5, overrides=overrides)
    resumed = tiny_run(output=tmp_path / "run", steps=9, overrides=overrides, resume=True)
    assert resumed.same_weights(tiny_run(steps=9, overrides=overrides))
    assert not resumed.same_weights(tiny_run(steps=9))


# AdamW


def test_every_device_of_a_profile_has_the_fused_kernel():
    pattern = HardwareSection.model_fields["device"].metadata[0].pattern
    devices = set(re.findall(r"cpu|mps|cuda", pattern))
    assert devices == {"cpu", "mps", "cuda"}
    assert devices <= set(_get_fused_kernels_supported_devices())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fused_adamw_takes_every_dtype_on_the_cpu(dtype):
    weight = nn.Parameter(torch.ones(3, 4, dtype=dtype))
    optimizer = AdamWProvider().create([{"params": [weight]}], learning_rate=0.1, weight_decay=0.0)
    weight.sum().backward()
    optimizer.step()
    assert torch.allclose(weight, torch.full_like(weight, 0.9), atol=1e-2)


# The check before a step


@pytest.fixture(params=["host", "device"])
def guarded(request, monkeypatch):
    """A guard over AdamW with a window of 4, and a function that takes a step."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = AdamWProvider().create([{"params": [weight]}], learning_rate=0.1, weight_decay=0.1)
    if request.param == "device":
        monkeypatch.setattr(finite_guard, "decides_on_device", lambda *_: True)
    guard = FiniteGuard(optimizer, CPU, window=4)

    def step(number, loss=1.0, norm=1.0):
        weight.grad = torch.full((3,), norm if norm != 1.0 else 0.5)
        before = weight.detach().clone()
        state = {k: v.clone() for k, v in optimizer.state[weight].items()}
        guard.step(number, torch.tensor(loss), torch.tensor(norm))
        if not state:  # made, as zeros, in the first step
            return not weight.equal(before)
        after = optimizer.state[weight]
        unmoved = weight.equal(before) and all(after[k].equal(v) for k, v in state.items())
        return not unmoved

    return SimpleNamespace(guard=guard, step=step, optimizer=optimizer)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["loss", "norm"])
def test_a_step_that_is_not_finite_moves_nothing(guarded, bad, which):
    assert guarded.step(1) and not guarded.step(2, **{which: bad}) and guarded.step(3)
    assert guarded.guard.read() == (1, 0, [2])


def test_read_names_the_steps_that_were_skipped_since_the_last_time(guarded):
    nan = float("nan")
    for number in range(1, 12):  # more than the window holds
        guarded.step(number, loss=nan if number in (2, 3, 7, 11) else 1.0)
    assert guarded.guard.read() == (4, 1, [2, 3, 7, 11])
    assert guarded.guard.read() == (4, 1, [])
    guarded.step(12, norm=nan)
    assert guarded.guard.read() == (5, 2, [12])
    guarded.step(13)
    assert guarded.guard.read() == (5, 0, [])


def test_a_checkpoint_takes_no_number_from_the_log(guarded):
    for number, loss in ((1, 1.0), (2, float("nan")), (3, float("nan"))):
        guarded.step(number, loss=loss)
    state = guarded.guard.state()
    resumed = FiniteGuard(guarded.optimizer, CPU, window=4)
    resumed.load(*state)
    assert guarded.guard.read() == resumed.read() == (2, 2, [2, 3])
    assert resumed.state() == [2, 2]
    resumed.load(2, 0)
    assert resumed.read() == (2, 0, [])


def test_the_host_decides_where_the_optimizer_cannot_be_told():
    model = build()
    cuda = torch.device("cuda")
    for provider in (AdamWProvider(), MuonProvider()):
        optimizer = optimizer_of(model, provider)
        assert finite_guard.decides_on_device(optimizer, cuda)
        assert not finite_guard.decides_on_device(optimizer, CPU)
    unknown = torch.optim.SGD(model.parameters())
    assert not finite_guard.decides_on_device(unknown, cuda)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("name", ["embedding.weight", "blocks.0.ffn.up.weight"])
def test_a_step_of_muon_that_is_not_finite_changes_nothing(on_device, name, monkeypatch):
    monkeypatch.setattr(finite_guard, "decides_on_device", lambda *_: on_device)
    settings = {"muon": {"weight_decay": 0.2}}
    model, twin = build(), build()
    optimizer, alone = (optimizer_of(m, MuonProvider(settings)) for m in (model, twin))
    guard = FiniteGuard(optimizer, CPU, window=1)

    def step(number: int, *bad: str) -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        for parameter in bad:
            model.get_parameter(parameter).grad[0, 0] = float("nan")
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        guard.step(number, torch.tensor(1.0), norm)

    step(1, name)
    assert same(weights_of(model), weights_of(twin))
    step(2)
    take_steps(twin, alone, 1)
    before = weights_of(model), copy.deepcopy(optimizer_tensors(model, optimizer))
    assert same(before[0], weights_of(twin))
    assert same(before[1], optimizer_tensors(twin, alone))
    step(3, name)
    assert same(weights_of(model), before[0])
    assert same(optimizer_tensors(model, optimizer), before[1])
    assert guard.read() == (2, 1, [1, 3])
