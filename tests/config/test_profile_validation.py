"""Every problem of a profile at once, each with its place, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, field_validator

from apt_core.config import (
    Config,
    InactiveKey,
    Section,
    Source,
    check_files,
    parse_config,
    parse_override,
    read_profile,
    validate,
)
from apt_core.config.messages import KnownKeys
from apt_core.defaults import core_providers
from apt_core.errors import ConfigError, Problem
from apt_core.synonyms import key_meant, plain_word, table
from apt_core.types import SectionSpec
from apt_plugins.moe.settings import MoeSettings
from apt_plugins.trainable.settings import TrainableSettings


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def problems_of(profile: dict[str, Any], **options: Any) -> list[Problem]:
    return validate(Source.from_dict(profile), **options).problems


def only(profile: dict[str, Any], **options: Any) -> Problem:
    (problem,) = problems_of(profile, **options)
    return problem


def test_five_mistakes_report_five(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(
        "extends: tiny_debug\n"
        "model:\n"
        "  d_modle: 64\n"
        "  num_layers: -2\n"
        "training:\n"
        '  batch_size: "2"\n'
        "  model_dim: 3\n"
        "data: {max_length: 4096}\n"
    )
    with pytest.raises(ConfigError) as caught:
        validate(read_profile("x.yaml")).require()
    assert str(caught.value).startswith("5 problems:")
    found = {problem.key: problem for problem in caught.value.problems}
    assert {key: problem.where for key, problem in found.items()} == {
        "model.d_modle": "x.yaml:3",
        "model.num_layers": "x.yaml:4",
        "training.batch_size": "x.yaml:6",
        "training.model_dim": "x.yaml:7",
        "data.max_length": "x.yaml:8",
    }
    assert found["model.d_modle"].hint == "did you mean 'd_model'?"
    assert found["training.batch_size"].hint == "write it without quotes"


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("modle", "did you mean 'model'?"),
        ("model.d_modle", "did you mean 'd_model'?"),
        ("model.batch_size", "did you mean 'training.batch_size'?"),
        ("model.tva.ranks", "did you mean 'rank'?"),
        ("model.r", "did you mean 'model.tva.r'?"),
        ("training.max_length", "did you mean 'data.max_length'?"),
        ("d_model", "did you mean 'model.d_model'?"),
        ("monitoring.wandb.enable", "did you mean 'enabled'?"),
        ("schedules.ramp.strat", "did you mean 'start'?"),
        (
            "hardware.qqq",
            "known keys here: backend, device, distributed, num_gpus, num_threads, tf32",
        ),
    ],
)
def test_an_unknown_key_at_any_depth_gets_a_suggestion(path: str, hint: str) -> None:
    value: Any = 1
    profile = nested(path, value)
    if path == "schedules.ramp.strat":
        profile["schedules"]["ramp"].update(start=1, end=2)
    problem = only(profile)
    assert (problem.message, problem.key, problem.hint) == ("unknown key", path, hint)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("training.lr", "learning_rate"),
        ("lr", "training.learning_rate"),
        ("model.seq_len", "max_seq_len"),
        ("data.block_size", "model.max_seq_len"),
        ("model.hidden_size", "d_model"),
        ("training.n_embd", "model.d_model"),
        ("model.n_layer", "num_layers"),
        ("model.numHiddenLayers", "num_layers"),
        ("n-head", "model.num_heads"),
        ("model.intermediate_size", "d_ff"),
        ("training.steps", "max_steps"),
        ("steps", "training.max_steps"),
        ("model.flash", "attention_name"),
        ("training.gradient_accumulation_steps", "grad_accum_steps"),
        ("training.max_grad_norm", "gradient_clip"),
        ("num_train_epochs", "training.max_epochs"),
        ("training.per_device_train_batch_size", "batch_size"),
        ("training.bf16", "mixed_precision"),
        ("hardware.fp16", "training.mixed_precision"),
        ("training.eval_interval", "evaluation.eval_freq"),
        ("training.learningRate", "learning_rate"),
        ("data.LEARNING-RATE", "training.learning_rate"),
    ],
)
def test_what_others_call_a_key_leads_to_it(written: str, meant: str) -> None:
    problem = only(nested(written, 1))
    assert (problem.message, problem.hint) == ("unknown key", f"did you mean {meant!r}?")


@pytest.mark.parametrize(
    ("path", "value", "hint"),
    [
        ("hardware.device", "gpu", "did you mean cuda?"),
        ("training.mixed_precision", "bf16", "did you mean true?"),
        ("training.mixed_precision", "fp32", "did you mean false?"),
        ("hardware.distributed", "fsdp2", "did you mean fsdp?"),
        ("hardware.distributed", "FSDP", "did you mean 'fsdp'?"),
        ("hardware.device", "cpu:0", "did you mean cpu?"),
        ("training.max_steps", "inf", ""),
        ("training.max_steps", "12", "write it without quotes"),
        ("debug.log_level", "info", "did you mean 'INFO'?"),
    ],
)
def test_what_others_call_a_value_leads_to_it(path: str, value: str, hint: str) -> None:
    assert only(nested(path, value)).hint == hint


def test_the_table_of_other_names_leads_to_names_that_there_are() -> None:
    names, values = table()
    known = KnownKeys(Config, {"model.moe": MoeSettings, "trainable": TrainableSettings})
    for ours, others in names.items():
        section, _, key = ours.rpartition(".")
        assert key in known.children[section], ours
        for word in others.split():
            assert word == plain_word(word) and word not in known.places, (ours, word)
            assert key_meant(word) == ours, f"{word} stands for two keys"
    providers = {f"{spec.kind}:{spec.name}" for spec in core_providers("")}
    providers |= {"attention:flash_v2", "attention:linear_causal", "position:none"}
    for of, known_values in values.items():
        words = [word for others in known_values.values() for word in others.split()]
        assert len(words) == len(set(words)), of
        assert "." in of or {f"{of}:{name}" for name in known_values} <= providers


def test_what_an_unknown_key_stands_for_causes_no_further_problem() -> None:
    profile = {"model": {"max_seq_length": 2048}, "data": {"max_length": 2048}}
    assert [problem.key for problem in problems_of(profile)] == ["model.max_seq_length"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model.d_model", "64", "a whole number, not the text '64'"),
        ("model.d_model", True, "a whole number, not true"),
        ("model.d_model", 64.0, "a whole number, not 64.0"),
        ("model.d_model", None, "a whole number, not nothing (null)"),
        ("model.d_model", [64], "a whole number, not a list"),
        ("model.d_model", -64, "at least 1, not -64"),
        ("model.d_model", 10**30, "at most"),
        pytest.param("model.d_model", 10**5000, "a number of more than 38 digits", id="enormous"),
        ("model", 5, "a section with keys, not 5"),
        ("model", None, "a section with keys, not nothing"),
        ("model.tva", [], "a section with keys, not a list"),
        ("training.learning_rate", "1e-3", "a number, not the text"),
        ("training.learning_rate", float("nan"), "a finite number"),
        ("training.learning_rate", float("inf"), "a finite number"),
        ("training.learning_rate", 0, "more than 0"),
        ("training.learning_rate", True, "a number, not true"),
        ("training.mixed_precision", 1, "true, false or 'auto', not 1"),
        ("training.mixed_precision", "on", "true, false or 'auto', not the text 'on'"),
        ("training.betas", [0.9], "is missing"),
        ("training.betas", [0.9, 1.0], "less than 1"),
        ("training.seed", -1, "at least 0"),
        ("training.compile", "yes", "true, false or 'auto', not the text 'yes'"),
        ("debug.log_level", "debug", "'DEBUG', 'INFO'"),
        ("hardware.device", "gpu", "must match"),
        ("plugins", "moe", "a list, not the text 'moe'"),
        ("plugins", [{"nam": "x", "name": "y"}], "unknown key"),
        ("plugins", ["x", {"priority": 3}], "is missing"),
        ("plugins", [{"name": "y", "on_failure": "ignore"}], "'isolate' or 'required'"),
        ("plugins", [{"name": "y", "priority": 101}], "at most 100"),
        ("plugins", [3], "a section with keys, not 3"),
        ("name", [1], "text, not a list"),
        ("model.attention_name", "", "must not be empty"),
        ("schedules.x", "fast", "a number or a ramp"),
        ("schedules.x", True, "a number or a ramp"),
        ("schedules.x", {"start": 1}, "is missing"),
        ("schedules.x", {"start": 1, "end": 2, "by": "batch"}, "'epoch', 'step' or 'token'"),
        ("schedules.x", {"start": 1, "end": "2"}, "a number, not the text '2'"),
        ("schedules.x", {"start": 1, "end": 2, "by": "token"}, "needs its last position"),
        ("schedules.x", {"start": 1, "end": 2, "until": 5, "warmup": 5}, "both say"),
        ("schedules.x", {"start": 0, "end": 2, "shape": "exponential"}, "cannot go from"),
        ("schedules.enable_moe_at_epoch", 2.5, "whole number"),
        ("schedules.enable_moe_at_epoch", 0, "at least 1"),
        ("schedules.enable_moe_at_epoch", {"start": 1, "end": 2}, "whole number"),
        ("schedules.enable_moe_at_epcoh", 2, "unknown key"),
        ("schedules.enable_moe", 2, "unknown key"),
    ],
)
def test_a_wrong_value_says_what_is_expected(path: str, value: Any, words: str) -> None:
    problem = only(nested(path, value))
    assert words in problem.message
    assert problem.key.startswith(path)


@pytest.mark.parametrize(
    ("profile", "key", "words"),
    [
        ({"model": {"d_model": 65, "num_heads": 4}}, "model.d_model", "not divisible by the 4"),
        ({"model": {"num_heads": 7}}, "model.num_heads", "not divisible by the 7"),
        ({"model": {"num_heads": 4, "num_kv_heads": 3}}, "model.num_kv_heads", "not divide"),
        ({"model": {"tva": {"r": 33}}}, "model.tva.r", "leaves no rank"),
        ({"model": {"tva": {"r": 10}}}, "model.tva.r", "odd rank 3"),
        ({"model": {"tva": {"rank": 5}}}, "model.tva.rank", "odd"),
        ({"model": {"tva": {"rank": 64}}}, "model.tva.rank", "more than the head dimension 32"),
        ({"model": {"d_model": 3, "num_heads": 4, "d_ff": 8}}, "model.d_model", "by the 4 heads"),
        ({"model": {"d_model": 13, "attention_name": "mha"}}, "model.d_model", "12 and 16 are"),
        ({"model": {"num_kv_heads": 8}}, "model.num_kv_heads", "does not divide the 4 heads"),
        (
            {"model": {"attention_name": "mha", "d_model": 12}},
            "model.d_model",
            "4 heads (model.num_heads) of mha the odd width 3, and rope",
        ),
        ({"model": {"attention_pattern": ["x", "mha"], "num_heads": 128}}, "model.num_heads", "1"),
        ({"model": {"ffn_name": "vft", "vft": {"rank": 129}}}, "model.vft.rank", "128 of model.d_"),
        ({"model": {"ffn_name": "vft", "vft": {"r": 129}}}, "model.vft.r", "no rank of the 128"),
        (
            {"model": {"attention_name": "mha", "ffn_name": "vft", "d_model": 2, "num_heads": 1}},
            "model.d_model",
            "a ratio of 4 leaves no rank of the 2",
        ),
        (
            {"model": {"attention_name": "mha", "mha": {"head_dim": 9}}},
            "model.mha.head_dim",
            "9 is odd, and rope",
        ),
        (
            {"model": {"rope": {"scaling": {"type": "yarn", "factor": 4}}}},
            "model.rope.scaling.type",
            "yarn needs the context of the first training",
        ),
        (
            {
                "model": {
                    "rope": {
                        "scaling": {
                            "type": "llama3",
                            "factor": 4,
                            "original_max_seq_len": 8,
                            "low_freq_factor": 4,
                        }
                    }
                }
            },
            "model.rope.scaling.low_freq_factor",
            "4 is not below high_freq_factor",
        ),
        ({"model": {"attention_pattern": []}}, "model.attention_pattern", "empty"),
        ({"model": {"attention_pattern": ["mha"] * 5}}, "model.attention_pattern", "5 layers"),
        ({"data": {"max_length": 257}}, "data.max_length", "more than the 256"),
        ({"model": {"max_seq_len": 64}, "data": {"max_length": 65}}, "data.max_length", "64"),
        (
            {"training": {"warmup_steps": 10, "max_steps": 10}},
            "training.warmup_steps",
            "does not end within",
        ),
        ({"data": {"source": "pydoc", "train_path": "x"}}, "data.source", "only one"),
        (
            {"schedules": {"enable_a_at_epoch": 2, "enable_a_at_step": 9}},
            "schedules.enable_a_at_step",
            "in another unit",
        ),
        (
            {"schedules": {"enable_a_at_epoch": 3, "disable_a_at_epoch": 3}},
            "schedules.disable_a_at_epoch",
            "before it is enabled",
        ),
    ],
)
def test_contradictions_are_found(profile: dict[str, Any], key: str, words: str) -> None:
    problem = only(profile)
    assert problem.key == key
    assert words in f"{problem.message} ({problem.hint})"


def test_the_rank_of_a_ratio_names_the_key_and_the_remedy() -> None:
    problem = only({"model": {"d_model": 64, "num_heads": 4, "tva": {"r": 17}}})
    assert problem.key == "model.tva.r"
    assert problem.hint == "choose r from 1 to 16, or set model.tva.rank"


@pytest.mark.parametrize(
    "model",
    [
        {"attention_name": "mha", "tva": {"r": 33}},
        {"attention_name": "mha", "tva": {"rank": 3}, "mha": {"qk_norm": True}},
        {"attention_name": "mha", "num_heads": 8, "num_kv_heads": 1},
        {"tva": {"rank": 32}, "vft": {"rank": 4096}},
        {"ffn_name": "vft", "vft": {"rank": 128}},
        {"ffn_name": "vft", "vft": {"r": 999, "rank": 5}},
        {"attention_name": "linear", "d_model": 12, "position_name": "rope"},
        {"rope": {"theta": 500_000}, "position_name": "none"},
        {"rope": {"scaling": {"type": "yarn", "factor": 4}}, "position_name": "none"},
        {"attention_name": "mha", "d_model": 10, "num_heads": 3, "mha": {"head_dim": 4}},
    ],
)
def test_settings_are_only_checked_where_their_layer_is_used(model: dict[str, Any]) -> None:
    assert problems_of({"model": model}) == []


def test_every_attention_of_a_pattern_is_checked() -> None:
    assert only({"model": {"attention_pattern": ["mha", "tva_default"], "tva": {"r": 33}}})
    mixed = {"attention_pattern": ["mha", "tva_default"], "d_model": 10, "mha": {"head_dim": 4}}
    assert "not divisible by the 4" in only({"model": mixed}).message
    both = {"attention_pattern": ["mha", "tva_default"], "d_model": 12, "tva": {"rank": 3}}
    assert [problem.key for problem in problems_of({"model": both})] == [
        "model.tva.rank",
        "model.d_model",
    ]


@pytest.mark.parametrize("position", ["learned", "none"])
@pytest.mark.parametrize(
    "model",
    [
        {"tva": {"rank": 3}},
        {"tva": {"r": 10}},
        {"attention_name": "mha", "d_model": 12},
    ],
)
def test_only_rope_asks_for_an_even_width(model: dict[str, Any], position: str) -> None:
    assert "rope turns pairs" in only({"model": model}).message
    assert "model.position_name" in only({"model": model}).hint
    assert problems_of({"model": {**model, "position_name": position}}) == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "model.tva.rank=3",
            "--model.tva.rank: model.tva.rank: the rank 3 is odd, and rope turns pairs of "
            "dimensions (choose an even rank, or another model.position_name)",
        ),
        (
            "model.tva.rank=18",
            "--model.tva.rank: model.tva.rank: 18 is more than the head dimension 16 "
            "(model.d_model / model.num_heads) (choose at most 16)",
        ),
        (
            "model.num_kv_heads=3",
            "--model.num_kv_heads: model.num_kv_heads: 3 does not divide the 4 heads of "
            "model.num_heads (choose a divisor of 4)",
        ),
    ],
)
def test_a_size_from_the_command_line_is_named_with_value_and_remedy(
    argument: str, message: str
) -> None:
    key = argument.partition("=")[0]
    overrides = [parse_override(argument, where=f"--{key}")]
    assert str(*validate(read_profile("tiny_debug", overrides)).problems) == message


def test_shortening_a_run_from_the_command_line_is_no_mistake() -> None:
    source = Source.from_dict({"training": {"warmup_steps": 10}})
    assert not validate(source.with_overrides([parse_override("training.max_steps=3")])).problems


def test_numbers_are_taken_for_text_where_people_write_them() -> None:
    config = parse_config({"name": 7, "version": 1.0, "description": 3})
    assert (config.name, config.version, config.description) == ("7", "1.0", "3")


def test_whole_numbers_are_fine_where_any_number_is() -> None:
    assert parse_config({"training": {"learning_rate": 1}}).training.learning_rate == 1.0


def test_problems_of_reading_are_reported_with_the_others() -> None:
    source = Source.from_dict({"model": {1: 2}, "trainng": {}})
    assert len(validate(source).problems) == 2


# Data files


def test_missing_data_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.txt").write_text("text")
    source = Source.from_dict({"data": {"train_path": "gone.txt", "val_path": "here.txt"}})
    (problem,) = check_files(
        validate(source).require(), source, ("data.train_path", "data.val_path")
    )
    assert problem.key == "data.train_path" and "'gone.txt'" in problem.message


def test_paths_of_other_loaders_need_not_be_files() -> None:
    source = Source.from_dict({"data": {"train_path": "user/set", "loader": "hf_datasets"}})
    assert check_files(validate(source).require(), source, ()) == []


# Sections of plugins


class Router(Section):
    enabled: bool = True
    experts: int = 4
    noise: float = 0.0


class Lenient(BaseModel):
    size: int = 1
    inner: Router | None = None
    either: int | bool = 1

    @field_validator("size")
    @classmethod
    def _check(cls, value: int) -> int:
        if value == 13:
            raise KeyError("a defect of the plugin")
        return value


MOE = SectionSpec("model.moe", Router)
MINE = SectionSpec("mine", Lenient)
DEEP = SectionSpec("mine.deep.part", Router)


def test_a_plugin_replaces_the_placeholder_of_its_section() -> None:
    profile = {"model": {"moe": {"experts": 8, "noise": 1}}, "monitoring": {"wandb": {"noise": 2}}}
    wandb = SectionSpec("monitoring.wandb", Router)
    config = parse_config(profile, sections=[MOE, wandb])
    assert config.section("model.moe") == Router(experts=8, noise=1.0)
    assert config.section("monitoring.wandb") == config.monitoring.wandb == Router(noise=2.0)


def test_a_plugins_section_has_its_defaults_where_nothing_is_written() -> None:
    assert parse_config({}, sections=[MINE]).section("mine") == Lenient()


def test_sections_are_reached_by_path() -> None:
    config = parse_config({"model": {"tva": {"r": 2}}}, sections=[MINE, DEEP])
    tva = config.section("model.tva")
    assert tva is config.model.tva
    assert config.section("mine.deep.part") == Router()
    assert config.section("model.moe") is None
    assert config.section("model.d_model") is None
    assert config.section("nothing.there") is None


@pytest.mark.parametrize(
    ("profile", "key", "hint"),
    [
        ({"model": {"moe": {"exprts": 1}}}, "model.moe.exprts", "did you mean 'experts'?"),
        ({"model": {"moe": {"experts": "1"}}}, "model.moe.experts", "write it without quotes"),
        ({"mine": {"sise": 1}}, "mine.sise", "did you mean 'size'?"),
        ({"mine": {"inner": {"nois": 1}}}, "mine.inner.nois", "did you mean 'noise'?"),
        ({"mine": {"deep": {"part": {"nois": 1}}}}, "mine.deep.part.nois", "did you mean 'noise'?"),
        ({"mine": 3}, "mine", ""),
        ({"mine": {"either": []}}, "mine.either", ""),
        ({"mine": {"deep": {"prat": {}}}}, "mine.deep.prat", "did you mean 'part'?"),
        ({"mine": {"deep": 3}}, "mine.deep", ""),
        ({"mien": {}}, "mien", "did you mean 'mine'?"),
    ],
)
def test_problems_in_plugins_sections_are_located(
    profile: dict[str, Any], key: str, hint: str
) -> None:
    problem = only(profile, sections=[MOE, MINE, DEEP])
    assert (problem.key, problem.hint) == (key, hint)


def test_a_crash_in_a_plugins_own_check_is_its_problem() -> None:
    problem = only({"mine": {"size": 13}}, sections=[MINE])
    assert problem.key == "mine" and "KeyError" in problem.message


def test_a_section_has_one_owner() -> None:
    assert only({}, sections=[MINE, MINE]).key == "mine"
    for path in ("training", "training.seed", "model.tva", "plugins", "schedules.mine", "name"):
        assert only({}, sections=[SectionSpec(path, Router)]).key == path


def test_sections_of_plugins_that_were_left_out_are_inactive() -> None:
    profile = {
        "mine": {"anything": "goes"},
        "model": {"moe": {"noise": 3}},
        "training": {"seed": 7},
    }
    source = Source.from_dict(profile)
    reasons = {"mine": "mine is blocked", "model.moe": "moe is blocked", "training": "no", "x": "-"}
    checked = validate(source, inert=reasons)
    assert checked.require().training.seed == 7, "a plugin's name may be that of a core section"
    assert checked.inactive == [
        InactiveKey("mine", "mine is blocked"),
        InactiveKey("model.moe", "moe is blocked"),
    ]


# Keys that do nothing yet


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.amp_level", "O1"),
        ("monitoring.wandb.enabled", True),
        ("monitoring.tensorboard.enabled", True),
        ("hardware.num_gpus", 4),
        ("evaluation.metrics", ["reasoning"]),
    ],
)
def test_a_key_that_does_nothing_is_named_with_the_reason(path: str, value: Any) -> None:
    checked = validate(Source.from_dict(nested(path, value)))
    assert checked.problems == []
    (inactive,) = checked.inactive
    assert inactive.key == path and inactive.reason


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data.truncation", False),
        ("data.padding", "do_not_pad"),
        ("monitoring.wandb", {"enabled": False, "project": "x", "tags": ["y"]}),
        ("hardware.num_gpus", 1),
        ("evaluation.metrics", ["perplexity", "accuracy"]),
        ("training.compile", True),
    ],
)
def test_a_value_that_asks_for_nothing_is_not_inactive(path: str, value: Any) -> None:
    assert validate(Source.from_dict(nested(path, value))).inactive == []


def test_an_active_plugin_makes_its_keys_work() -> None:
    tracker = Source.from_dict(nested("monitoring.wandb.enabled", True))
    assert validate(tracker, active={"wandb"}).inactive == []
    experts = Source.from_dict(nested("model.moe.enabled", True))
    assert validate(experts, [MOE], active={"moe"}).inactive == []
