"""Every provider of the core does what providers of its kind must do."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

import pytest

from apt_core.defaults import core_providers
from apt_core.testing.conformance import CHECKS, Check, LeftOut, checks_of

CORE = {spec.key: spec for spec in core_providers("0")}
OF_A_FILE = {"tokenizer:hf"}
"""Needs a file, and is checked by tests of its own."""

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((key, {}) for key in CORE if key not in OF_A_FILE),
    ("attention:tva_default", {"r": 1, "s": 0}),
    ("attention:tva_default", {"r": 2, "s": 3, "qk_norm": True}),
    ("attention:tva_default", {"rank": 6, "factored": True}),
    ("attention:mha", {"qk_norm": True, "qk_norm_eps": 1e-5, "head_dim": 6}),
    ("position:rope", {"scaling": {"type": "yarn", "factor": 4.0, "original_max_seq_len": 8}}),
    ("ffn:vft", {"rank": 7}),
]
LEFT_OUT = {
    ("attention:tva_default", "documents"),
    ("attention:mha", "documents"),
    ("position:learned", "default positions"),
    ("position:learned", "long sequences"),
    ("ffn:gelu", "plain form"),
    ("ffn:relu2", "plain form"),
    ("norm:layernorm", "plain form"),
}
"""What says nothing about a provider of the core; everything else is done."""

COMPILED_LONG = {
    "attention:tva_default",
    "attention:tva_default-r=1-s=0",
    "attention:tva_default-rank=6-factored=True",
    "attention:mha-qk_norm=True-qk_norm_eps=1e-05-head_dim=6",
    "ffn:vft",
}
"""Settings of providers that are compiled with other settings too."""

WITHOUT_CHECKS = {"dataset"}


def every_check() -> list[Any]:
    found = []
    for key, settings in SETTINGS:
        kind = CORE[key].kind
        shown = "".join(f"-{name}={value}" for name, value in settings.items())
        for check in checks_of(kind, resolve_name(str(CORE[key].factory))(settings or None)):
            long = str(check) == "compile" and key + shown in COMPILED_LONG
            marks = [pytest.mark.long] if long else []
            found.append(pytest.param(key, check, id=f"{key}{shown}-{check}", marks=marks))
    return found


@pytest.mark.parametrize(("key", "check"), every_check())
def test_a_provider_of_the_core_does_what_its_kind_must(key: str, check: Check) -> None:
    if (key, check.name) in LEFT_OUT:
        with pytest.raises(LeftOut):
            check.run()
        return
    try:
        check.run()
    except LeftOut as why:
        pytest.fail(f"left out: {why}")


def test_every_kind_of_the_core_that_builds_or_computes_has_checks() -> None:
    assert {spec.kind for spec in CORE.values()} - CHECKS.keys() == WITHOUT_CHECKS


@pytest.mark.parametrize("kind", CHECKS)
def test_to_list_checks_builds_nothing(kind: str) -> None:
    names = [check.name for check in checks_of(kind, object())]
    assert names[0] == "builds" and len(names) == len(set(names))
