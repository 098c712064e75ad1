"""``apt-hooks explain``: what a key means, who reads it, its value in a profile and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import apt_core.cli.train
from apt_core.cli.hooks import app

if TYPE_CHECKING:
    from tests.cli.conftest import Command


@pytest.fixture
def profiles(folder: Path, plugin: str) -> None:
    Path("below.yaml").write_text("training:\n  learning_rate: 2e-3\n  max_steps: 100\n")
    Path("mine.yaml").write_text(
        f"extends: below.yaml\nplugins: [{plugin}]\nsample:\n  strength: 0.7\n"
        "training: {max_epochs: 4, warmup_steps: 10}\n"
        "schedules:\n  enable_sample_at_epoch: 2\n"
        "  sample_weight: {start: 0, end: 1, by: step, warmup: 20}\n"
    )


@pytest.mark.parametrize(
    ("key", "lines"),
    [
        ("model.d_model", ["value: whole number ≥ 1, ≤ 1.67772e+07", "default: 128",
                           "read by the core"]),
        ("model.d_ff", ["Hidden width of the feed-forward."]),
        ("lr", ["training.learning_rate", "value: number > 0, ≤ 1000"]),
        ("batch-size", ["training.batch_size"]),
        ("training.betas=3", ["training.betas", "default: [0.9, 0.95]",
                                "read by optimizer:adamw"]),
        ("hardware.backend", ["value: nccl, gloo, mpi", "default: none"]),
        ("model.norm_name", ["read by the registry: it names a provider of norm (rmsnorm, "
                             "layernorm)"]),
        ("model.position_name", ["(rope, learned, none)"]),
        ("data.mixture[0].weight", ["data.mixture.weight", "default: 1.0"]),
        ("data.mixture", ["data.mixture.name"]),
        ("model.tva", ["read by attention:tva_default", "model.tva.r "]),
        ("schedules.enable_any_at_step", ["From this step on, any is enabled.",
                                          "value: whole number ≥ 1"]),
        ("schedules", ["enable_PLUGIN_at_epoch"]),
    ],
)  # fmt: skip
def test_it_tells_of_any_key_of_the_core(command: Command, key: str, lines: list[str]) -> None:
    outcome = command(app, "explain", key)
    assert (outcome.code, outcome.err) == (0, "")
    assert all(line in outcome.out for line in lines), outcome.out


def test_it_tells_of_keys_and_parameters_of_plugins(command: Command, plugin: str) -> None:
    out = command(app, "explain", "sample.strength", "--plugin", plugin).out
    assert "How strong." in out and "read by plugin sample" in out
    assert "plugin sample reads schedules.sample_weight" in out
    assert "read by norm:sample_norm of plugin sample" in out
    for key in ("schedules.sample_weight", "sample_weight"):
        out = command(app, "explain", key, "--plugin", plugin).out
        assert out.startswith("schedules.sample_weight\n") and "read by plugin sample" in out


def test_it_tells_the_value_in_a_profile_where_it_is_from_and_what_schedules_make_of_it(
    command: Command, profiles: None
) -> None:
    def explained(key: str, *more: str) -> str:
        outcome = command(app, "explain", key, "-p", "mine.yaml", *more)
        assert (outcome.code, outcome.err) == (0, "")
        return outcome.out

    assert "in mine.yaml: 0.7 (mine.yaml:4)" in (out := explained("sample.strength"))
    assert "plugin sample is enabled from epoch 2 on" in out
    assert "in mine.yaml: 0.002 (below.yaml:2, inherited)" in (out := explained("lr"))
    assert "in a run of 100 steps at the most: 1: 0.0002, 10: 0.002, " in out and "100: 0" in out
    assert "times 12 for matrices that read the residual stream" in out
    out = explained("lr", "--set", "training.learning_rate=0.5", "--set", "model.d_model=64")
    assert (
        "in mine.yaml: 0.5 (command line, --set training.learning_rate)" in out
        and "times 24 for" in out
    )
    assert "in mine.yaml: 128 (default)" in explained("model.d_model")
    assert "inactive there: attention:mha is not used" in explained("model.mha.head_dim")
    out = explained("sample_weight")  # the steps of an epoch are not known
    assert "sample_weight: linear from 0 to 1, over 20 steps; its steps are known" in out
    out = explained("sample_weight", "--set", "schedules.enable_sample_at_epoch=null")
    assert "schedules.sample_weight by step: 1: 0, 5: 0.2, 9: 0.4, 13: 0.6, 17: 0.8, 21: 1" in out


def test_the_plugin_of_a_key_may_not_be_active(command: Command, profiles: None) -> None:
    Path("other.yaml").write_text("extends: below.yaml\n")
    out = command(app, "explain", "sample.strength", "--plugin", "no:other", "-p", "mine.yaml").out
    assert "inactive there" not in out
    outcome = command(app, "explain", "sample.strength", "-p", "other.yaml")
    assert outcome.code == 2 and "there is no such key" in outcome.err


def test_json_has_it_all(command: Command, profiles: None) -> None:
    told = command(app, "explain", "lr", "-p", "mine.yaml", "--json").json
    assert told["key"] == "training.learning_rate" and told["value"] == 0.002
    assert told["default"] == 1e-4 and told["readers"] == ["the core"]
    told = command(app, "explain", "model.vft", "--json").json
    assert [key["path"] for key in told["keys"]] == ["model.vft.r", "model.vft.rank"]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("training.lerning_rate", "did you mean 'training.learning_rate'?"),
        ("model.n_embd", "did you mean 'model.d_model'?"),
        ("eps", "did you mean one of model.norm.eps, training.eps?"),
        ("modle", "did you mean 'model'?"),
        ("training.max_steps.x", "there is no such key"),
        ("schedules.nothing", "no installed plugin has the parameter 'nothing'"),
        ("", "there is no such key"),
        ("päth\x1b", "there is no such key"),
    ],
)  # fmt: skip
def test_a_key_that_there_is_not_is_bad_input(command: Command, key: str, says: str) -> None:
    outcome = command(app, "explain", key)
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.err and "\x1b" not in outcome.err


def test_a_profile_with_problems_is_explained_all_the_same(command: Command) -> None:
    Path("bad.yaml").write_text("training:\n  learning_rate: fast\n  max_epoch: 3\n")
    outcome = command(app, "explain", "lr", "-p", "bad.yaml")
    assert outcome.code == 0 and "in bad.yaml: fast (bad.yaml:2)" in outcome.out
    assert "warning: bad.yaml:2: training.learning_rate: must be a number" in outcome.err
    assert "max_epochs" in outcome.err
    assert command(app, "explain", "lr", "-p", "absent").code == 2


def test_apt_train_explains_with_the_options_at_hand(command: Command, profiles: None) -> None:
    train = apt_core.cli.train.app
    out = command(train, "-p", "mine", "--model.d_model", "64", "--explain", "d_model").out
    assert "in mine: 64 (command line, --model.d_model)" in out
    assert command(train, "--explain", "num_heads").out.startswith("model.num_heads\n")


def test_a_secret_is_masked(command: Command, folder: Path) -> None:
    (folder / "secretive.py").write_text(
        "from pydantic import BaseModel\n\nfrom apt_core import SectionSpec, hookimpl\n\n\n"
        "class Settings(BaseModel):\n    api_key: str = 'hidden-default'\n\n\n"
        "@hookimpl\ndef apt_register_config():\n    return [SectionSpec('secretive', Settings)]\n"
    )
    Path("mine.yaml").write_text("plugins: [secretive.py]\nsecretive: {api_key: hunter2}\n")
    for more in ((), ("--json",)):
        out = command(app, "explain", "secretive.api_key", "-p", "mine.yaml", *more).out
        assert "api_key" in out and "hunter2" not in out and "hidden-default" not in out
    bad = "plugins: [secretive.py]\nsecretive: {api_key: hunter2}\nmodel: {d_model: -1}\n"
    Path("mine.yaml").write_text(bad)
    outcome = command(app, "explain", "secretive.api_key", "-p", "mine.yaml")
    assert "hunter2" not in outcome.out + outcome.err
