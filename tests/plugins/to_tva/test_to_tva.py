"""Multi-head attention that becomes TVA in mid-run: exact at the width of a head, within a
tolerance below it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from apt_core.errors import ConfigError, PluginError
from apt_core.kernel import Kernel, boot
from apt_core.modeling import ModelBuilder, generator_for
from apt_core.modeling.carry import materialize
from apt_core.modeling.costs import model_cost
from apt_core.modeling.structure import base_structure, config_after, transform_of
from apt_core.planning.stages import stages
from apt_core.runs.opened import open_run
from apt_core.testing import TINY_PROFILE, TinyRun, tiny_run

PLUGIN = "apt_plugins.to_tva.plugin"
MODEL = {
    "d_model": 16,
    "num_heads": 2,
    "num_layers": 2,
    "d_ff": 24,
    "vocab_size": 40,
    "max_seq_len": 16,
    "attention_name": "mha",
}
EXACT = {
    "alone": {},
    "narrow heads with QK-norm": {"mha": {"head_dim": 6, "qk_norm": True}, "num_kv_heads": 1},
    "some layers": {"attention_pattern": ["mha", "tva_default"], "tva": {"rank": 8}},
    "learned positions": {"position_name": "learned"},
}


def booted(model: dict[str, Any], to_tva: dict[str, Any]) -> Kernel:
    data = {"model": {**MODEL, **model}, "to_tva": to_tva, "hardware": {"device": "cpu"}}
    return boot(data, plugins=[PLUGIN], files=False)


@pytest.mark.parametrize("case", EXACT)
def test_nothing_is_lost_at_the_width_of_a_head(case: str) -> None:
    kernel = booted(EXACT[case], {})
    old = ModelBuilder(kernel.config, kernel.registry).build_model().double()
    with torch.no_grad():
        for name, parameter in old.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator_for(1, name))
            parameter.add_(0.2 * noise)
    transform = transform_of(kernel, "to_tva", base_structure(kernel))
    assert transform is not None
    config = config_after(kernel.config, transform)
    with torch.device("meta"):
        built = ModelBuilder(config, kernel.registry).build_model()
    assert [type(m) for m in built.modules()] == [type(m) for m in transform.model.modules()]
    transform.model.double()
    new = materialize(transform, old, seed=0, num_layers=2)
    ids = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = []
    for model in (old, new):
        logits.append(model.eval()(ids).logits)
        F.cross_entropy(logits[-1].flatten(0, 1), ids.flatten()).backward()
    assert (logits[1] - logits[0]).abs().max() < 1e-10
    known = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        if (origin := transform.origin(name, known)) is not None:
            expected = origin.first_moment(known[origin.source].grad)
            assert torch.allclose(parameter.grad, expected, atol=1e-12, rtol=1e-8), name
            assert (origin.second_moment(expected.new_ones(known[origin.source].shape)) > 0).all()


REFUSED = [
    ({"attention_name": "tva_default"}, {}, "to_tva", "has no mha"),
    ({}, {"rank": 10}, "to_tva.rank", "a rank of 10 is more than model.d_model 16"),
    ({"mha": {"head_dim": 4}}, {"rank": 6}, "to_tva.rank", "more than the width of a head, 4"),
    ({"mha": {"head_dim": 12}}, {}, "to_tva.rank", "a rank of 12 is more than"),
    ({}, {"rank": 4}, "to_tva.tolerance", "and changes the loss"),
    ({}, {"rank": 5, "tolerance": 0.1}, "to_tva.rank", "5 is odd"),
    ({"position_name": "learned"}, {"rank": 4, "tolerance": 0.1}, "to_tva.rank", "no way to a"),
    ({"attention_pattern": ["mha", "tva_default"]}, {}, "to_tva.rank", "of rank 4 already"),
    ({}, {"rank": 4, "tolerance": 0}, "to_tva.tolerance", "must be more than 0.0"),
]


@pytest.mark.parametrize(("model", "to_tva", "key", "message"), REFUSED)
def test_bad_input_is_refused_at_once(
    model: dict[str, Any], to_tva: dict[str, Any], key: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        booted(model, to_tva)
    told = [p for p in caught.value.problems if p.key == key and message in str(p)]
    assert told, str(caught.value)


SETTINGS = {
    "model.attention_name": "mha",
    "model.mha.qk_norm": True,
    "model.num_layers": 2,
    "to_tva.rank": 4,
    "to_tva.tolerance": 0.5,
    "training.ema_decay": 0.9,
    "training.max_steps": 6,
    "training.log_every_steps": 1,
    "training.save_every_steps": 1,
    "training.keep_last": 0,
    "training.learning_rate": 3e-3,
    "evaluation.eval_freq": 0,
    "evaluation.sample_tokens": 4,
    "hardware.num_threads": 1,
    "schedules.enable_to_tva_at_step": 4,
}


def train(folder: Path, *, strict: bool = True, stop: int | None = None, **options: Any) -> TinyRun:
    changes = options.pop("changes", {})
    return tiny_run(
        PLUGIN,
        overrides={**SETTINGS, **changes},
        output=folder,
        strict=strict,
        stop_at_step=stop,
        **options,
    )


def test_a_lower_rank_is_taken_within_its_tolerance(tmp_path: Path) -> None:
    """Both losses are kept, either side of the switch resumes to the bit, and the run opens."""
    run = train(tmp_path / "run")
    (switch,) = run.manifest["switches"]
    change = abs(switch["loss_after"] - switch["loss_before"])
    assert 1e-4 < change < 0.5
    assert run.weights["blocks.1.attention.compress"].shape == (4, 8)
    for step in (3, 4):
        train(tmp_path / "parts", stop=step, resume=step == 4)
    assert train(tmp_path / "parts", resume=True).same_weights(run)
    model = open_run(tmp_path / "run", weights="last").model
    assert all(p.equal(run.weights[n]) for n, p in model.named_parameters())


def test_beyond_its_tolerance_the_attention_stays(tmp_path: Path) -> None:
    tight = {"to_tva.tolerance": 1e-7}
    run = train(tmp_path / "run", strict=False, changes=tight)
    assert run.manifest["switches"] == []
    assert "blocks.0.attention.compress" not in run.weights
    assert run.manager.records["to_tva"].state == "quarantined"
    with pytest.raises(PluginError, match="tolerance of 1e-07"):
        train(tmp_path / "strict", changes=tight)


def test_it_is_planned_with_the_rank() -> None:
    data = copy.deepcopy(TINY_PROFILE)
    data["model"]["attention_name"] = "mha"
    data["to_tva"] = {"rank": 2, "tolerance": 1.0}
    data["schedules"] = {"enable_to_tva_at_epoch": 2}
    kernel = boot(data, plugins=[PLUGIN], files=False)
    for kind, name in kernel.providers:
        kernel.registry.get(kind, name)
    before, after = (stage.structure for stage in stages(kernel, kernel.schedule))
    costs = [model_cost(kernel, each.config) for each in (before, after)]
    assert costs[1].kv_cache_bytes_per_token * 4 == costs[0].kv_cache_bytes_per_token
    assert after.params == costs[1].params
    assert after.flops_per_token(costs[1]) < before.flops_per_token(costs[0])
