"""Settings that have no effect beside others are reported where somebody has written them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apt_core.config import parse_override
from apt_core.errors import ConfigError
from apt_core.kernel import boot

EXPERTS = ["moe", "routing", "align", "voter"]
TVA = "model.tva.s=1"
LINEAR = "model.rope.scaling={type: linear, factor: 2}"
YARN = "model.rope.scaling={type: yarn, factor: 2, original_max_seq_len: 8}"
CASES = [
    # what has no effect, beside what, and beside what it has
    ("training.muon.learning_rate=0.5", "", "training.optimizer_name=muon"),
    ("training.decay_ratio=0.5", "", "training.lr_schedule_name=wsd"),
    ("training.min_lr_ratio=0.1", "training.lr_schedule_name=constant", ""),
    ("training.early_stopping_min_delta=0.1", "", "training.early_stopping_patience=2"),
    ("model.rope.theta=5.0", "model.position_name=none", ""),
    ("model.mha.qk_norm=true", "", "model.attention_pattern=[mha]"),
    ("model.tva.qk_norm=true", "model.attention_name=mha", ""),
    ("model.tva.qk_norm_eps=0.1", "model.tva.qk_norm=false", "model.tva.qk_norm=true"),
    ("model.tva.qk_norm_eps=0.1", "model.tva.rank=8", "model.tva.rank=16"),
    ("model.mha.head_dim=8", "", "model.attention_name=mha"),
    ("model.rope.scaling.beta_fast=8.0", LINEAR, YARN),
    ("model.rope.scaling.truncate=false", LINEAR, YARN),
    ("model.tva.r=4", "model.tva.rank=4", ""),
    ("model.tva.tau=0.5", "model.tva.s=0", TVA),
    ("model.vft.r=8", "model.ffn_name=relu2", "model.ffn_name=vft"),
    ("model.attention_name=mha", "model.attention_pattern=[tva_default]", ""),
    ("evaluation.sample_prompt=x", "evaluation.sample_tokens=0", ""),
    ("evaluation.sample_temperature=0.5", "evaluation.sample_tokens=0", ""),
    ("monitoring.wandb.project=x", "", None),
    ("monitoring.wandb.tags=[x]", "", None),
    ("monitoring.tensorboard.log_dir=x", "", None),
    ("debug.verbose=true", "debug.log_level=INFO", "debug.log_level=DEBUG"),
    ("model.moe.shared_weight=0.2", "", "model.moe.shared_expert=split"),
    ("model.moe.dropless_steps=3", "model.moe.dropless=true", ""),
    ("model.moe.capacity=2.0", "model.moe.dropless=true", ""),
    ("model.moe.capacity=2.0", "schedules.moe_capacity=1.5", ""),
    ("model.moe.symmetry_breaking=false", "model.ffn_name=gelu", ""),
    ("routing.bias_rate=0.1", "", "routing.balancing=bias"),
    ("model.voting.threshold=0.5", "model.voting.k=1", ""),
    ("model.voting.window=2", "model.voting.length=1", "model.voting.length=4"),
    ("model.voting.winner=majority", "", "model.voting.length=4"),
    ("model.bistate.momentum_end=0.99", "model.bistate.mode=rdrop", ""),
    ("model.bistate.tau_align=0.5", "model.bistate.beta=0", ""),
    ("model.bistate.weight=0.5", "schedules.align_weight=0.1", ""),
]


def profile_of(*settings: str) -> dict[str, Any]:
    """A profile with the experts, and these settings."""
    profile: dict[str, Any] = {"plugins": EXPERTS}
    for setting in (TVA, "model.dropout=0.1", *filter(None, settings)):
        override, place = parse_override(setting), profile
        for key in override.path[:-1]:
            place = place.setdefault(key, {})
        value, last = override.value, override.path[-1]
        place[last] = {**place.get(last, {}), **value} if isinstance(value, dict) else value
    return profile


def reported(*settings: str) -> set[str]:
    return {item.key for item in boot(profile_of(*settings), files=False).inactive}


@pytest.mark.parametrize(("setting", "beside", "useful"), CASES)
def test_a_setting_without_effect_is_reported_beside_what_makes_it_useless_alone(
    setting: str, beside: str, useful: str | None
) -> None:
    # What makes it useless is one setting, so that an empty other one does not.
    beside = "model.tva.s=0" if not beside and "tva.tau" in setting else beside
    # align looks at TVA's compensator.
    attention = any(word in f"{setting} {beside} {useful}" for word in ("tva", "attention"))
    extra = ["model.bistate.beta=0"] if attention else []
    key = setting.partition("=")[0]
    assert key in reported(*extra, setting, beside)
    with pytest.raises(ConfigError, match=f"{key}: it does nothing here"):
        boot(profile_of(*extra, setting, beside), files=False, strict=True)
    if useful is not None:
        assert key not in reported(*extra, setting, useful)


def test_a_value_waits_for_another_choice_where_that_is_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def keys(child: str, *overrides: str) -> set[str]:
        Path("child.yaml").write_text(f"extends: speedrun_cpu\n{child}")
        given = [parse_override(text) for text in overrides]
        return {item.key for item in boot("child.yaml", overrides=given, files=False).inactive}

    adamw = "training: {optimizer_name: adamw}\n"
    momentum = "training.muon.momentum"
    assert keys(adamw) == keys("", "training.optimizer_name=adamw") == set()
    assert keys(f"{adamw[:-2]}, muon: {{momentum: 0.5}}}}\n") == {momentum}
    assert keys("training: {muon: {momentum: 0.5}}\n", "training.optimizer_name=adamw") == set()
    # On the command line a value is meant, also that of the default.
    assert keys(adamw, f"{momentum}=0.95") == {momentum}
    assert keys("", "training.optimizer_name=adamw", f"{momentum}=0.95") == {momentum}
    assert keys(f"{adamw[:-2]}, muon: {{momentum: 0.95}}}}\n") == set()


def test_what_is_switched_off_waits_and_what_was_never_on_does_not() -> None:
    off = "monitoring.wandb.enabled=false"
    assert reported("monitoring.wandb.project=x", off) == set()
    assert reported("model.moe.top_k=1", "model.moe.enabled=false") == set()
    override = parse_override("model.moe.top_k=1")
    kernel = boot(profile_of("model.moe.enabled=false"), overrides=[override], files=False)
    assert {item.key for item in kernel.inactive} == {"model.moe.top_k"}


def test_shipped_profiles_stay_quiet_also_where_a_plugin_is_left_out() -> None:
    for name in ("base", "tiny_debug", "speedrun_cpu", "gpt5_moe_mini"):
        assert boot(name).inactive == []
    for plugin in ("moe", "routing", "align", "voter"):
        boot("gpt5_moe_mini", plugins=[f"no:{plugin}"], strict=True)
    assert boot("tiny_debug", overrides=[parse_override("model.attention_name=mha")]).inactive == []


def test_providers_and_plugins_tell_what_they_do_not_heed(tmp_path: Path) -> None:
    source = """
from apt_core import ProviderSpec, SectionSpec, Inactive, hookimpl
from pydantic import BaseModel

class Mine(BaseModel):
    on: bool = False
    size: int = 1

def inactive(config):
    mine = config.section("mine")
    if mine.size == 13:
        raise ValueError("a defect")
    if not mine.on:
        yield Inactive("mine.size", "mine.on is false", ("mine.on",))

@hookimpl
def apt_register_config():
    return [SectionSpec("mine", Mine, inactive=inactive)]

@hookimpl
def apt_register_providers():
    build = "apt_core.optim.optimizers.adamw:AdamWProvider"
    return [ProviderSpec("optimizer", "silent", build),
            ProviderSpec("optimizer", "plain", build, reads=["training.eps"])]
"""
    path = str(tmp_path / "mine.py")
    Path(path).write_text(source)

    def keys(optimizer: str, **mine: Any) -> set[str]:
        training = {"optimizer_name": optimizer, "betas": [0.5, 0.5], "eps": 0.1}
        profile = {"plugins": [path], "training": training, "mine": mine}
        return {item.key for item in boot(profile, files=False).inactive}

    assert keys("silent", size=2) == {"mine.size"}
    assert keys("silent", on=True, size=2) == keys("silent", size=1) == set()
    assert keys("plain") == {"training.betas"}
    with pytest.raises(
        ConfigError, match="mine: its check of inactive settings failed: ValueError"
    ):
        keys("silent", size=13)


def test_the_check_of_a_section_tells_every_contradiction_with_its_place(tmp_path: Path) -> None:
    source = """
from apt_core import Problem, SectionSpec, hookimpl
from pydantic import BaseModel

class Mine(BaseModel):
    low: int = 0
    high: int = 9

def check(config):
    mine = config.section("mine")
    if mine.low > mine.high:
        yield Problem(f"{mine.low} is above mine.high", "mine.low", hint="lower it")
        yield Problem("nothing is between its ends")
    if mine.low == 13:
        raise ValueError("a defect")

@hookimpl
def apt_register_config():
    return [SectionSpec("mine", Mine, check=check)]
"""
    plugin, profile = tmp_path / "mine.py", tmp_path / "some.yaml"
    plugin.write_text(source)

    def problems(low: int, rest: str = "") -> list[str]:
        profile.write_text(f"plugins: [{plugin}]\nmine:\n  low: {low}\n{rest}")
        with pytest.raises(ConfigError) as caught:
            boot(profile, files=False)
        return [str(problem).removeprefix(f"{profile}:") for problem in caught.value.problems]

    assert problems(10) == [
        "3: mine.low: plugin mine: 10 is above mine.high (lower it)",
        "2: mine: plugin mine: nothing is between its ends",
    ]
    # What was yielded before the defect is of a check that is not to be trusted.
    assert problems(13) == ["2: mine: its check failed: ValueError: a defect"]
    # A profile that is not valid is shown to no plugin.
    (problem,) = problems(10, "model: {tva: {r: 99}}\n")
    assert "model.tva.r" in problem
