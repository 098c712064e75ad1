"""The table of kinds says what the contracts, the profile and the core's providers say."""

from __future__ import annotations

import apt_core.providers as contracts
from apt_core.config import parse_config
from apt_core.defaults import core_providers
from apt_core.kinds import KINDS, named_providers
from apt_core.types import SectionSpec

CONTRACTS = {
    "ffn": "FeedForwardProvider",
    "lr_schedule": "LRScheduleProvider",
    **{
        kind: f"{kind.capitalize()}Provider" for kind in KINDS if kind not in ("ffn", "lr_schedule")
    },
}


def test_every_kind_has_its_contract_keys_of_the_profile_and_a_default_of_the_core() -> None:
    config = parse_config({})
    core = {(spec.kind, spec.name) for spec in core_providers("")}
    for kind in KINDS.values():
        contract = getattr(contracts, CONTRACTS[kind.name])
        assert all(callable(getattr(contract, method)) for method in kind.methods), kind
        for key in kind.keys:
            section, _, name = key.partition(".")
            assert name in type(getattr(config, section)).model_fields, kind
        if kind.default:
            section, _, name = kind.keys[0].partition(".")
            assert getattr(getattr(config, section), name) == kind.default
            assert (kind.name, kind.default) in core


def test_a_later_key_of_a_kind_takes_the_place_of_those_before() -> None:
    data = {
        "model": {
            "attention_name": "mha",
            "attention_pattern": ["tva_default", 3, ""],
            "ffn_name": None,
            "position_name": "none",
        },
        "data": {"loader": "text_default", "source": 5},
        "mine": {"deep": {"judge": "strict"}},
    }
    sections = [SectionSpec("mine.deep", names={"judge": "align", "other": "norm"})]
    assert named_providers(data, sections) == {
        ("attention", "tva_default"): "model.attention_pattern",
        ("dataset", "text_default"): "data.loader",
        ("align", "strict"): "mine.deep.judge",
    }
    assert named_providers({"model": "text", "data": None, "mine": []}, sections) == {}
