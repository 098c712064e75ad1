"""The resolved profile, its JSON Schema, and the profiles that come with APT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from apt_core.config import (
    Config,
    Section,
    Source,
    json_schema,
    parse_config,
    read_profile,
    validate,
)
from apt_core.config.yaml_text import ProfileDumper, parse_yaml
from apt_core.types import SectionSpec
from apt_plugins.align import plugin as align
from apt_plugins.moe import plugin as moe
from apt_plugins.routing import plugin as routing
from apt_plugins.voter import plugin as voter

SHIPPED = ["base", "tiny_debug", "gpt5_moe_reasoning"]
WITH_EXPERTS = [
    spec
    for plugin in (moe, align, routing, voter)
    for spec in plugin.Plugin().apt_register_config()
]

TINY_DEBUG: dict[str, Any] = {
    "name": "tiny_debug",
    "version": "1.0.0",
    "plugins": [],
    "model": {
        "d_model": 64,
        "num_heads": 4,
        "num_layers": 2,
        "d_ff": 256,
        "vocab_size": 256,
        "max_seq_len": 128,
        "attention_name": "tva_default",
        "tva": {"r": 2, "s": 1, "tau": 0.2},
    },
    "training": {
        "batch_size": 2,
        "max_epochs": 3,
        "learning_rate": 1e-4,
        "warmup_steps": 10,
        "weight_decay": 0.01,
        "gradient_clip": 1.0,
        "mixed_precision": False,
        "save_freq": 1,
        "checkpoint_dir": "./checkpoints/tiny_debug",
    },
    "schedules": {},
    "data": {"loader": "text_default", "max_length": 128},
    "evaluation": {"metrics": ["perplexity"], "eval_freq": 10, "save_best": False},
    "hardware": {"device": "cpu", "num_gpus": 0, "distributed": False},
    "debug": {
        "verbose": True,
        "log_level": "DEBUG",
        "profile_memory": True,
        "check_gradients": True,
    },
}

GPT5: dict[str, Any] = {
    "name": "gpt5_moe_reasoning",
    "version": "1.0.0",
    "plugins": ["moe", "align", "routing", "voter"],
    "model": {
        "d_model": 768,
        "num_heads": 12,
        "num_layers": 24,
        "d_ff": 3072,
        "vocab_size": 50257,
        "max_seq_len": 2048,
        "attention_name": "tva_default",
        "tva": {"r": 4, "s": 1, "tau": 0.18},
        "moe": {"enabled": True, "experts": 64, "top_k": 2, "capacity": 1.25, "balance_loss": 0.01},
        "bistate": {"alpha": 0.35, "beta": 0.20, "tau_align": 0.15},
        "voting": {"threshold": 2.2, "k": 3},
    },
    "training": {
        "batch_size": 32,
        "max_epochs": 50,
        "learning_rate": 3e-5,
        "warmup_steps": 1500,
        "weight_decay": 0.015,
        "gradient_clip": 1.0,
        "mixed_precision": True,
        "amp_level": "O1",
        "save_freq": 1,
        "checkpoint_dir": "./checkpoints/gpt5_moe",
    },
    "schedules": {
        "enable_moe_at_epoch": 2,
        "enable_align_at_epoch": 3,
        "enable_voter_at_epoch": 5,
        "route_temp": {"start": 1.5, "end": 0.8, "by": "epoch"},
        "moe_capacity": {"start": 1.5, "end": 1.1, "by": "epoch"},
        "align_weight": {"start": 0, "end": 0.3, "by": "step", "warmup": 5000},
        "vote_threshold": {"start": 3.0, "end": 2.0, "by": "epoch"},
    },
    "data": {
        "train_path": "./data/reasoning_train.jsonl",
        "val_path": "./data/reasoning_val.jsonl",
        "loader": "text_default",
        "max_length": 2048,
        "truncation": True,
        "padding": "max_length",
    },
    "evaluation": {
        "metrics": ["perplexity", "accuracy", "reasoning_quality"],
        "eval_freq": 500,
        "save_best": True,
    },
    "monitoring": {
        "wandb": {
            "enabled": False,
            "project": "apt-gpt5-moe",
            "tags": ["moe", "reasoning", "gpt5"],
        },
        "tensorboard": {"enabled": True, "log_dir": "./logs/gpt5_moe"},
    },
    "hardware": {"device": "cuda", "num_gpus": 4, "distributed": True, "backend": "nccl"},
    "debug": {
        "verbose": False,
        "log_level": "INFO",
        "profile_memory": False,
        "check_gradients": True,
    },
}


class Mine(Section):
    size: int = 3
    name: str = "x"


class Wandb(BaseModel):
    enabled: str = "auto"
    team: str = ""


SECTIONS = [
    SectionSpec("mine.deep", Mine),
    SectionSpec("model.moe", Mine),
    SectionSpec("monitoring.wandb", Wandb),
]


def reread(config: Config, sections: list[SectionSpec]) -> Config:
    data = parse_yaml(config.to_yaml(), "profile.yaml").data
    return validate(Source.from_dict(data, name="another"), sections).require()


# The profiles that come with APT


@pytest.mark.parametrize(
    ("name", "contents"), [("tiny_debug", TINY_DEBUG), ("gpt5_moe_reasoning", GPT5)]
)
def test_shipped_profiles_hold_exactly_their_contract(name: str, contents: dict[str, Any]) -> None:
    assert read_profile(name).data == contents


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_are_valid(name: str) -> None:
    assert validate(read_profile(name), WITH_EXPERTS).problems == []
    assert validate(read_profile(name), available=WITH_EXPERTS).problems == []


@pytest.mark.parametrize("name", ["base", "tiny_debug"])
def test_profiles_without_plugins_have_no_inactive_key(name: str) -> None:
    assert validate(read_profile(name)).inactive == []


def test_a_users_own_tiny_debug_with_data_paths_is_valid() -> None:
    path = "./apt_model/train.txt"
    profile = {**TINY_DEBUG, "data": {**TINY_DEBUG["data"], "train_path": path, "val_path": path}}
    assert parse_config(profile).data.text_source is None
    assert parse_config(TINY_DEBUG).data.text_source == "pydoc"


# The resolved profile


@pytest.mark.parametrize("name", SHIPPED)
def test_the_resolved_profile_reads_back_equal(name: str) -> None:
    for sections in (WITH_EXPERTS, []):
        config = validate(read_profile(name), sections, available=WITH_EXPERTS).require()
        assert reread(config, sections) == config


@pytest.mark.filterwarnings("error")
def test_sections_of_plugins_are_part_of_the_resolved_profile() -> None:
    profile = {"mine": {"deep": {"size": 7}}, "model": {"moe": {"name": "3e-5"}}}
    config = parse_config(profile, sections=SECTIONS)
    assert config.to_dict()["mine"] == {"deep": {"size": 7, "name": "x"}}
    assert config.to_dict()["monitoring"]["wandb"] == {"enabled": "auto", "team": ""}
    assert reread(config, SECTIONS) == config
    assert config != parse_config({}, sections=SECTIONS)


def test_a_section_within_another_plugins_section_is_kept() -> None:
    sections = [SectionSpec("mine", Mine), SectionSpec("mine.inner.part", Wandb)]
    profile = {"mine": {"size": 5, "inner": {"part": {"team": "us"}}}}
    config = parse_config(profile, sections=sections)
    assert config.to_dict()["mine"] == {
        "size": 5,
        "name": "x",
        "inner": {"part": {"enabled": "auto", "team": "us"}},
    }
    assert reread(config, sections) == config


def test_plugin_requests_keep_their_short_form() -> None:
    plugins = ["a", {"name": "b", "priority": 3}, {"name": "c", "on_failure": "required"}]
    config = parse_config({"plugins": plugins})
    assert config.to_dict()["plugins"] == plugins
    assert reread(config, []) == config


def test_the_resolved_profile_is_plain_yaml_to_everyone() -> None:
    config = validate(read_profile("gpt5_moe_reasoning"), WITH_EXPERTS).require()
    assert yaml.safe_load(config.to_yaml()) == config.to_dict()


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_text_survives_writing_and_reading(text: str) -> None:
    written = yaml.dump({"a": text}, Dumper=ProfileDumper, allow_unicode=True)
    assert parse_yaml(written, "x").data == {"a": text}


@pytest.mark.parametrize(
    "text", ["3e-5", "010", "1:30", "yes", "2024-01-01", "~", "<<", "1_0", ".5"]
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    written = yaml.dump({"a": text}, Dumper=ProfileDumper)
    assert parse_yaml(written, "x").data == yaml.safe_load(written) == {"a": text}


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(number=st.floats(allow_nan=False) | st.integers(-(2**70), 2**70))
def test_any_number_survives_writing_and_reading(number: float) -> None:
    read = parse_yaml(yaml.dump({"a": number}, Dumper=ProfileDumper), "x").data["a"]
    assert read == number and type(read) is type(number)


def test_a_config_cannot_be_changed() -> None:
    config = parse_config({})
    with pytest.raises(ValidationError):
        config.model.d_model = 3  # type: ignore[misc]


# JSON Schema


def test_the_schema_describes_every_key() -> None:
    schema = json_schema(SECTIONS)
    assert schema["$schema"].endswith("2020-12/schema")
    json.dumps(schema)
    for name, definition in schema["$defs"].items():
        if name in ("Mine", "Wandb"):
            continue
        for key, entry in definition.get("properties", {}).items():
            of_plugin = entry.get("$ref") in ("#/$defs/Mine", "#/$defs/Wandb") or key == "mine"
            assert entry.get("description") or of_plugin, f"{name}.{key}"


def test_the_schema_holds_the_sections_of_plugins() -> None:
    schema = json_schema(SECTIONS)
    assert schema["properties"]["mine"]["properties"]["deep"] == {"$ref": "#/$defs/Mine"}
    assert schema["$defs"]["ModelSection"]["properties"]["moe"] == {"$ref": "#/$defs/Mine"}
    assert schema["$defs"]["MonitoringSection"]["properties"]["wandb"] == {"$ref": "#/$defs/Wandb"}
    assert "extends" in schema["properties"]


def test_two_plugins_may_name_their_models_alike() -> None:
    other = type("Mine", (Section,), {"__annotations__": {"other": int}, "other": 1})
    schema = json_schema([SectionSpec("one", Mine), SectionSpec("two", other)])
    one, two = (schema["properties"][key]["$ref"] for key in ("one", "two"))
    assert one != two


# Light to import


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, apt_core.config, apt_core.schedules;"
        "print([m for m in ('torch', 'typer', 'rich', 'numpy') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert run.stdout.strip() == "[]", run.stderr
