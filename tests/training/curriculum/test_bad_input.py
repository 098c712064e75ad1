"""What cannot work in a curriculum is told at the start, all of it, with the key and a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from tests.training.curriculum.conftest import Curriculum

pytestmark = pytest.mark.long

THIRD = """
from apt_core import ProviderSpec, hookimpl

@hookimpl
def apt_register_providers():
    return [ProviderSpec("ffn", "third", "third_ffn:Provider")]
"""

THIRD_FFN = """
from torch import nn
from apt_core.providers import FeedForwardProvider

class Third(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.only = nn.Linear(d_model, d_model, bias=False)
    def forward(self, x):
        return self.only(x)

class Provider(FeedForwardProvider):
    name, version = "third", "1"
    def create_layer(self, d_model, d_ff, dropout=0.0):
        return Third(d_model)
"""

CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "more per token than there are": (
        {"model.moe.experts": 2, "model.moe.top_k": 3},
        ("model.moe.top_k", "there are 2", "choose top_k <= experts"),
    ),
    "dropless with drops": (
        {"model.moe.dropless": True, "model.moe.capacity": 0.5},
        ("model.moe.capacity", "set dropless to false", "schedules.moe_capacity"),
    ),
    "dropless with a scheduled capacity": (
        {"model.moe.dropless": True},
        ("schedules.moe_capacity", "set model.moe.dropless to false"),
    ),
    "after the last epoch": (
        {"schedules.enable_moe_at_epoch": 9},
        ("schedules.enable_moe_at_epoch", "epoch 9 comes after the last", "training.max_epochs"),
    ),
    "a feed-forward that is no expert": (
        {"model.ffn_name": "vft"},
        ("model.ffn_name", "'vft' cannot become experts", "--plugin no:moe"),
    ),
    "a compensator without directions": (
        {"model.tva.s": 0},
        ("model.bistate.beta", "model.tva.s is 0", "set model.tva.s to 1"),
    ),
    "an attention without a compensator": (
        {"model.attention_name": "mha"},
        ("model.bistate.beta", "no attention of this model has", "tva_default"),
    ),
    "taken back": (
        {"schedules.disable_moe_at_epoch": 3},
        ("schedules.disable_moe_at_epoch", "cannot be taken back", "--plugin no:moe"),
    ),
    "switched off and on": (
        {"model.moe.enabled": False},
        ("schedules.enable_moe_at_epoch", "model.moe.enabled: false", "set model.moe.enabled"),
    ),
    "a misspelt router": (
        {"model.moe.router": "topk_mo"},
        ("model.moe.router", "did you mean 'topk_moe'?"),
    ),
    "a misspelt objective": (
        {"model.bistate.align": "bistate_defualt"},
        ("model.bistate.align", "did you mean 'bistate_default'?"),
    ),
    "several at once": (
        {
            "schedules.enable_moe_at_epoch": 9,
            "schedules.disable_moe_at_epoch": 10,
            "model.moe.router": "topk_mo",
            "model.bistate.align": "bistate_defualt",
            "model.moe.experts": 2,
            "model.moe.top_k": 3,
            "model.moe.dropless": True,
            "model.moe.capacity": 0.5,
            "model.tva.s": 0,
            "schedules.route_temp": {"start": 1.0, "end": 0.0, "by": "epoch"},
            "schedules.vote_threshold": -1.0,
        },
        (
            "schedules.enable_moe_at_epoch",
            "schedules.disable_moe_at_epoch",
            "model.moe.router",
            "model.bistate.align",
            "model.moe.top_k",
            "model.moe.capacity",
            "schedules.route_temp",
            "schedules.moe_capacity",
            "schedules.vote_threshold",
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_told_before_anything_is_made(curriculum: Curriculum, apt_train, case: str) -> None:
    curriculum.settings, said = CASES[case]
    curriculum.write()
    run = apt_train()
    assert run.code == 2 and "Epoch" not in run.out
    assert run.err.startswith("error: ") and "Traceback" not in run.err
    for words in said:
        assert words in run.err
    assert not run.folder.exists()


def test_a_feed_forward_of_a_third_party_is_no_expert_either(
    curriculum: Curriculum, apt_train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "third.py").write_text(THIRD)
    (tmp_path / "third_ffn.py").write_text(THIRD_FFN)
    monkeypatch.syspath_prepend(tmp_path)
    asked = ("--plugin", str(tmp_path / "third.py"), "--model.ffn_name", "third")
    run = apt_train(*asked)
    assert run.code == 2 and not run.folder.exists()
    assert "model.ffn_name" in run.err and "blocks.0 has a Third" in run.err
    assert apt_train(*asked, "--plugin", "no:moe", "--dry-run").code == 0


def test_a_checkpoint_with_experts_needs_the_plugin(apt_train, profile: Path) -> None:
    stopped = apt_train("--stop-at-step", "7", "--training.save_every_steps", "1")
    assert stopped.code == 0, stopped.err
    files = sorted(stopped.folder.glob("**/*"))
    fewer = apt_train("--resume", "--model.moe.experts", "3")
    refused = [apt_train("--resume", "--plugin", "no:moe")]
    data = yaml.safe_load(profile.read_text(encoding="utf-8"))
    data["plugins"].remove("moe")
    del data["model"]["moe"], data["schedules"]["enable_moe_at_epoch"]
    profile.write_text(yaml.safe_dump(data), encoding="utf-8")
    refused.append(apt_train("--resume"))
    for run in refused:
        assert run.code == 2
        assert "plugin moe has changed the structure" in run.err and "--plugin moe" in run.err
    assert fewer.code == 2 and "model.moe.experts" in fewer.err
    assert sorted(stopped.folder.glob("**/*")) == files


# Its sizes in time are made small: they are what the plan measures.
SHORT = ("--training.batch_size", "1", "--model.max_seq_len", "64", "--data.max_length", "64")


@pytest.mark.parametrize("without", ["moe", "align", "routing", "voter", "moe,align,routing,voter"])
def test_every_ablation_plans(apt_train, without: str) -> None:
    names = without.split(",")
    left_out = ",".join(f"no:{name}" for name in names)
    run = apt_train("--plugin", left_out, "--dry-run", *SHORT, of="gpt5_moe_reasoning")
    assert run.code == 0, run.err
    for name in ("moe", "align", "voter"):
        inactive = f"inactive: schedules.enable_{name}_at_epoch (plugin {name} is blocked)"
        assert (inactive in run.out) == (name in names)
        assert (f"enable {name}" in run.out) == (name not in names)
    assert not run.folder.exists()
