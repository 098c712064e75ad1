"""No key is accepted that nothing reads: it is read in a run, or reported inactive."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from apt_core.cli.train import _processes_wanted
from apt_core.config import Section
from apt_core.config.messages import models_in
from apt_core.errors import ConfigError
from apt_core.kernel import Kernel, boot
from apt_core.parallel.world import inactive_alone
from apt_core.testing import TINY_PROFILE
from apt_core.testing.tiny import TEXT
from apt_core.training import Trainer

JUDGES = ("apt_core.config.inactive", "apt_core.config.checks", "apt_core.config.schedule_check",
          "apt_core.config.validate", "apt_core.profile_check",
          "apt_core.provider_keys")  # fmt: skip
JUDGING = ("contradictions", "inactive", "inactive_alone")
"""Reading a key to judge it is not heeding it: modules of the core, and functions elsewhere."""

EXPERTS = ["moe", "routing", "align", "voter"]
CONTEXTS: dict[str, dict[str, Any]] = {
    "defaults": {"evaluation": {"sample_tokens": 0}},
    "other providers": {
        "model": {
            "attention_name": "mha",
            "ffn_name": "vft",
            "norm_name": "layernorm",
            "position_name": "learned",
            "ngram": {"orders": [2], "buckets": [64]},
        },
        "training": {
            "optimizer_name": "muon",
            "lr_schedule_name": "wsd",
            "early_stopping_patience": 3,
            "ema_decay": 0.5,
        },
        "debug": {"log_level": "DEBUG"},
    },
    "experts": {
        "plugins": EXPERTS,
        "model": {
            "tva": {"s": 1},
            "moe": {"shared_expert": "split", "experts": 2},
            "bistate": {},
            "voting": {},
        },
        "routing": {"balancing": "bias"},
    },
    "other experts": {
        "plugins": EXPERTS,
        "model": {
            "dropout": 0.1,
            "ffn_name": "gelu",
            "moe": {"dropless": True, "experts": 2, "shared_expert": "zero"},
            "bistate": {"mode": "rdrop", "beta": 0.0},
            "voting": {"k": 1},
        },
        "training": {"lr_schedule_name": "constant"},
    },
}
VALUES = {
    "model.d_model": 32,
    "model.num_kv_heads": 1,
    "model.attention_pattern": ["mha"],
    "model.num_heads": 1,
    "model.vocab_size": 300,
    "model.tva.rank": 2,
    "model.tva.s": 2,
    "model.voting.window": 2,
    "model.vft.rank": 2,
    "model.ngram.orders": [3],
    "model.ngram.buckets": [128],
    "model.moe.top_k": 1,
    "model.moe.experts": 4,
    "model.moe.granularity": 2,
    "training.mixed_precision": True,
    "training.betas": [0.5, 0.6],
    "training.checkpoint_dir": "elsewhere",
    "data.max_length": 8,
    "data.tokenizer.vocab_size": 300,
    "data.source": "pydoc",
    "data.padding": "longest",
    "evaluation.metrics": ["loss"],
    "hardware.device": "auto",
    "hardware.distributed": "ddp",
    "hardware.num_gpus": 2,
    "model.attention_name": "mha",
    "model.ffn_name": "relu2",
    "model.norm_name": "layernorm",
    "model.position_name": "none",
    "training.optimizer_name": "muon",
    "training.lr_schedule_name": "linear",
    "model.moe.router": "topk_default",
}
"""Values that are valid beside the rest; others are made from the default."""

NOT_OF_A_RUN = ("name", "version", "description", "plugins")
"""What a profile says of itself, and the list, of which other tests are."""

ONE_CHOICE = ("model.backbone_name", "data.tokenizer_name", "data.loader", "model.bistate.align")
"""Providers of which there is one to choose from."""


def active(kernel: Kernel) -> set[str]:
    """The plugins that are active."""
    return {name for name, row in kernel.manager.records.items() if row.state == "active"}


def merged(profile: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(dict(profile))
    *around, last = path.split(".")
    place = data
    for key in around:
        place = place.setdefault(key, {})
    place[last] = value
    return data


def profile_of(context: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    data = merged(TINY_PROFILE, "data.train_path", str(text))
    for section, values in context.items():
        if isinstance(values, dict):
            for key, value in values.items():
                data = merged(data, f"{section}.{key}", value)
        else:
            data[section] = values
    # Two steps, which are an epoch.
    data["training"] |= {"batch_size": 24, "max_epochs": 1, "log_every_steps": 1}
    return data


def keys_of(kernel: Kernel) -> dict[str, tuple[str, str, FieldInfo]]:
    """The keys of the profile's sections that are there, plugins' included: for each the class of
    its section, its name in it, and its field."""
    found: dict[str, tuple[str, str, FieldInfo]] = {}

    def walk(section: BaseModel, path: str) -> None:
        for name, field in type(section).model_fields.items():
            at, value = f"{path}.{name}".lstrip("."), getattr(section, name)
            if isinstance(value, BaseModel):
                walk(value, at)
            elif at != "schedules" and not list(models_in(field.annotation)):
                found[at] = (type(section).__name__, name, field)

    walk(kernel.config, "")
    for spec in kernel.sections:
        if spec.path:
            section = kernel.config.section(spec.path)
            assert section is not None
            walk(section, spec.path)
    return {key: found[key] for key in found if key not in NOT_OF_A_RUN}


def other_value(path: str, field: FieldInfo) -> Any:
    """A valid value that is not the default."""
    if path in VALUES:
        return VALUES[path]
    default = field.get_default(call_default_factory=True)
    choices: list[Any] = []
    for annotation in (field.annotation, *get_args(field.annotation)):
        if get_origin(annotation) is Literal:
            choices += [choice for choice in get_args(annotation) if choice != default]
    if choices:
        return choices[0]
    if isinstance(default, bool) or field.annotation == bool | None:
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default / 2 or 0.5
    if isinstance(default, tuple):
        return ["x"]
    kinds = str(field.annotation)
    return 1 if "int" in kinds else 0.5 if "float" in kinds else "x"


def read_in_a_run(
    profile: Mapping[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> set[tuple[str, str]]:
    """The keys, by class of their section and name, that something reads in a short run."""
    seen: set[tuple[str, str]] = set()
    plain = Section.__getattribute__

    def judges(frame: Any) -> bool:
        return frame.f_globals.get("__name__") in JUDGES or frame.f_code.co_name in JUDGING

    def recording(section: Section, name: str) -> Any:
        if not name.startswith("_") and name in type(section).model_fields:
            frame = sys._getframe(1)
            # A judge may ask a method of the section.
            callers = (
                (frame, frame.f_back)
                if isinstance(frame.f_locals.get("self"), Section)
                else (frame,)
            )
            if not any(map(judges, callers)):
                seen.add((type(section).__name__, name))
        return plain(section, name)

    with monkeypatch.context() as patch:
        patch.setattr(Section, "__getattribute__", recording)
        kernel = boot(profile)
        _processes_wanted(kernel)
        Trainer(kernel).fit()
    return seen


def test_every_key_is_read_in_a_run_or_reported_inactive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    silent, tried, known = [], set(ONE_CHOICE), set()
    for name, context in CONTEXTS.items():
        profile = profile_of(context, tmp_path)
        read = read_in_a_run(profile, tmp_path, monkeypatch)
        plain = boot(profile)
        for key, (section, attribute, field) in keys_of(plain).items():
            known.add(key)
            if (section, attribute) in read:
                tried.add(key)
                continue
            try:
                kernel = boot(merged(profile, key, other_value(key, field)), files=False)
            except ConfigError:
                continue  # it contradicts this context, and is tried in another one
            tried.add(key)
            if active(kernel) - active(plain):
                continue  # it activates a plugin
            inactive = [*kernel.inactive, *inactive_alone(kernel.config)]
            if not any(f"{key}.".startswith(f"{item.key}.") for item in inactive):
                silent.append(f"{key} ({name})")
    assert silent == []
    assert known - tried == set()
    assert {"training.muon.momentum", "routing.bias_rate", "model.ngram.orders"} <= known
