"""What a profile says of the trainable set is checked whole before the start, and planned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from apt_core import TrainableStage
from apt_core.config import parse_override
from apt_core.errors import ConfigError
from apt_core.kernel import Kernel, boot
from apt_core.modeling.trainable import Change
from apt_core.planning.footprint import Footprint
from apt_core.planning.stages import checked_trainable, stages
from apt_core.testing import TINY_PROFILE
from apt_plugins.trainable.settings import TrainableSettings


def kernel(*stages: dict[str, Any], model: Any = (), **options: Any) -> Kernel:
    profile = {
        **TINY_PROFILE,
        "model": {**TINY_PROFILE["model"], "num_layers": 4, **dict(model)},
        "training": {**TINY_PROFILE["training"], "max_steps": 20},
        "plugins": ["trainable", *options.pop("plugins", ())],
        "schedules": options.pop("schedules", {}),
        "trainable": {"stages": [*stages]},
    }
    return boot(profile, files=False, **options)


def refused(*stages: dict[str, Any], **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        made = kernel(*stages, **options)
        checked_trainable(made, made.schedule)
    return str(caught.value)


START = {"freeze": ["*"], "thaw": ["final_norm"]}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"freeze": ["embeding"]}],
         "trainable.stages[0].freeze: 'embeding' chooses no parameter of the model as it is then "
         "(did you mean 'embedding'?)"),
        ([{"freeze": ["blocks.4-7"]}],
         "'blocks.4-7' chooses no parameter of the model as it is then (its parts are embedding, "
         "blocks.0-3, final_norm)"),
        ([{"at_step": 2, "thaw": ["blocks.0"]}],
         "trainable.stages[0].thaw: what 'blocks.0' chooses is trained before this stage already "
         "(freeze it earlier, or take it out)"),
        ([START, {"at_step": 3, "freeze": ["blocks.1"]}],
         "trainable.stages[1].freeze: what 'blocks.1' chooses is frozen before this stage already"),
        ([{"freeze": ["blocks"]}, {"at_epoch": 2, "freeze": ["embedding", "*norm"]}],
         "trainable.stages[1]: every parameter is frozen from this stage on: nothing would be "
         "trained (let the same stage thaw"),
        ([START, {"at_step": 9, "thaw": ["blocks"]}, {"at_step": 9, "thaw": ["embedding"]}],
         "trainable.stages[2]: step 9 does not come after step 9, where the stage before begins"),
        ([START, {"at_step": 9, "thaw": ["blocks"]}, {"at_epoch": 1, "thaw": ["embedding"]}],
         "trainable.stages[2]: epoch 1 does not come after step 1, where a stage above it begins"),
        ([START, {"at_step": 21, "thaw": ["blocks"]}],
         "trainable.stages[1]: step 21 comes after the last one (training.max_steps = 20) (lower "
         "it, or raise training.max_steps)"),
        ([START, {"at_epoch": 3, "thaw": ["blocks"]}],
         "trainable.stages[1]: epoch 3 comes after the last one (training.max_epochs = 2)"),
        ([START, {"thaw": ["blocks"]}],
         "trainable.stages[1]: plugin trainable: does not say when it begins (give it at_step"),
        ([{"at_step": 2, "at_epoch": 1, "freeze": ["blocks"]}],
         "trainable.stages[0]: plugin trainable: begins at_step and at_epoch (name one of them)"),
        ([{"at_step": 2}], "trainable.stages[0]: plugin trainable: changes nothing (name what"),
        ([{"freeze": ["blocks"]}, {"at_step": 2, "unfreeze": ["blocks"]}],
         "trainable.stages[1].unfreeze: unknown key (did you mean 'thaw'?)"),
        ([{"freeze": ["blocks..ffn"]}], "trainable.stages[0].freeze[0]: "),
        ([{"freeze": "blocks"}], "trainable.stages[0].freeze: must be a list"),
        ([{"at_step": 0, "freeze": ["blocks"]}], "trainable.stages[0].at_step: must be at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_before_the_start(stages: Any, message: str) -> None:
    assert message in refused(*stages)


def test_all_problems_are_told_at_once_and_a_shortened_run_is_none() -> None:
    text = refused({"freeze": ["embeding"]}, {"at_step": 2, "thaw": ["blocks.9", "ffn"]})
    assert text.startswith("2 problems:") and "'embeding'" in text and "'blocks.9'" in text
    # A pattern that chooses nothing may have been meant to freeze what is thawed later.
    assert "is trained before" not in text
    late = {"at_step": 15, "thaw": ["*"]}
    short = [parse_override("training.max_steps=3")]
    (inactive,) = kernel(START, late, overrides=short).inactive
    assert inactive.key == "trainable.stages[1]"
    assert "step 15 comes after the last one" in inactive.reason
    assert "it does nothing here" in refused(START, late, overrides=short, strict=True)


def test_a_tied_weight_is_chosen_by_each_of_its_names() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embed"].weight
    change = Change.of(TrainableStage(freeze=["head"]), model)
    assert change.frozen == ["embed.weight", "head.bias"]


def test_the_plan_has_the_memory_of_each_stage() -> None:
    made = kernel(
        START,
        {"at_step": 5, "thaw": ["blocks.2-3"]},
        {"at_step": 8, "thaw": ["*"]},
        {"at_step": 12, "freeze": ["embedding", "blocks.0"]},
    )
    planned = [*stages(made, made.schedule)]
    names = ["start", "thaw blocks.2-3", "thaw embedding, blocks.0-1", "freeze embedding, blocks.0"]
    assert [stage.name for stage in planned] == names
    assert [stage.at for stage in planned] == [1, 5, 8, 12]
    total = planned[0].structure.params
    trained = [stage.structure.trained_params for stage in planned]
    block, embedding = (trained[1] - trained[0]) // 2, 256 * 16
    assert trained == [16, 16 + 2 * block, total, total - embedding - block]
    for stage, count in zip(planned, trained, strict=True):
        footprint = Footprint(made, torch.device("cpu"), stage.structure.model, stage.costs)
        assert footprint.weights.trainable == 4 * count
        state, _ = footprint.optimizer
        assert 8 * count <= state <= 8 * count + 8 * 64  # and a counter for each


def test_experts_of_what_is_frozen_are_planned_frozen() -> None:
    made = kernel(
        {"freeze": ["blocks"]},
        {"at_step": 7, "thaw": ["blocks.0.ffn.experts"]},
        model={"moe": {"experts": 2, "top_k": 1}},
        plugins=["moe"],
        schedules={"enable_moe_at_step": 4},
    )
    start, experts, thawed = stages(made, made.schedule)
    frozen = start.structure.params - start.structure.trained_params
    assert (experts.name, thawed.name) == ("enable moe", "thaw blocks.0.ffn.experts")
    assert experts.structure.params - experts.structure.trained_params > frozen
    learns = {name for name, p in thawed.structure.model.named_parameters() if p.requires_grad}
    assert {name for name in learns if "blocks" in name} == {
        *(f"blocks.{n}.ffn.router.weight" for n in range(4)),
        *(f"blocks.0.ffn.experts.{part}" for part in ("gate", "up", "down")),
    }
    # What is not there yet is not chosen.
    early = [{"freeze": ["embedding"]}, {"at_step": 2, "freeze": ["experts"]}]
    options = {"plugins": ["moe"], "schedules": {"enable_moe_at_step": 4}}
    assert "'experts' chooses no parameter of the model as it is then" in refused(*early, **options)


def test_a_plugin_without_stages_says_so(caplog: pytest.LogCaptureFixture) -> None:
    kernel()
    assert "trainable freezes nothing: trainable.stages is empty" in caplog.text
    assert TrainableSettings().stages == []
