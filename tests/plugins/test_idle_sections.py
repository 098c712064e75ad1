"""A section of a plugin that is installed and not active is checked by the plugin's own model, and
reported inactive."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from apt_core.config import parse_override
from apt_core.declarations import declared_by
from apt_core.errors import ConfigError, Problem
from apt_core.kernel import boot
from apt_core.runs.resume_check import saved_config

UNOWNED = "no active plugin owns this section"
DENSE = f"{UNOWNED}: the dense feed-forward stays"


def problems(profile: dict[str, Any], **options: Any) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        boot(profile, files=False, **options)
    return list(caught.value.problems)


def reported(profile: dict[str, Any]) -> dict[str, str]:
    return {item.key: item.reason for item in boot(profile, files=False).inactive}


def test_what_is_written_for_a_plugin_that_is_not_active_is_inactive() -> None:
    profile = {
        "model": {
            "moe": {"enabled": True, "dropless": True},
            # Beside another attention the active plugin refuses these weights.
            "bistate": {"beta": 0.2},
            "attention_name": "mha",
            "voting": {"k": 5},
        },
        "routing": {"balancing": "bias"},
    }
    sections = ("model.bistate", "model.voting", "routing")
    assert reported(profile) == {"model.moe": DENSE, **dict.fromkeys(sections, UNOWNED)}
    found = {problem.key: problem.message for problem in problems(profile, strict=True)}
    assert found == {
        "model.moe": f"it does nothing here: {DENSE}",
        **dict.fromkeys(sections, f"it does nothing here: {UNOWNED}"),
    }


def test_what_asks_for_nothing_is_not_reported() -> None:
    for model in ({"moe": {"enabled": False, "experts": 4}}, {"moe": None}, {}):
        kernel = boot({"model": model}, files=False, strict=True)
        assert kernel.inactive == []
        # The plugin's settings are nobody's: not even another plugin takes them for in effect.
        assert kernel.config.section("model.moe") is None
        assert "moe" not in kernel.config.to_dict()["model"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"moe": {"exprts": 4}}, "model.moe.exprts: unknown key (did you mean 'experts'?)"),
        ({"moe": {"experts": "4"}}, "must be a whole number, not the text '4'"),
        ({"bistate": {"alpha": -1}}, "model.bistate.alpha: must be at least 0.0, not -1"),
        ({"voting": 3}, "model.voting: must be a section with keys, not 3"),
        ({"num_experts": 4}, "model.num_experts: unknown key (did you mean 'model.moe.experts'?)"),
        ({"meo": {"experts": 4}}, "model.meo: unknown key (did you mean 'moe'?)"),
    ],
)
@pytest.mark.parametrize("plugins", [[], ["moe", "align", "voter"]])
def test_it_is_checked_as_that_of_an_active_one(
    model: dict[str, Any], message: str, plugins: list[str]
) -> None:
    (problem,) = problems({"model": model, "plugins": plugins})
    assert message in str(problem)


def test_what_the_section_contradicts_is_told_where_it_has_an_effect(tmp_path: Path) -> None:
    profile = tmp_path / "some.yaml"
    profile.write_text("model:\n  moe:\n    experts: 4\n")
    vain = [parse_override("model.moe.top_k=5")]
    assert [item.key for item in boot(profile, overrides=vain).inactive] == ["model.moe"]
    with pytest.raises(ConfigError) as caught:
        boot(profile, overrides=vain, plugins=["moe"])
    assert str(caught.value) == (
        "--model.moe.top_k: model.moe.top_k: plugin moe: 5 experts per token, and there are 4 "
        "(choose top_k <= experts)"
    )


def test_plugins_are_asked_only_where_a_key_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "apt_core.declarations.declared_by",
        lambda name, installed: asked.append(name) or declared_by(name, installed),
    )
    boot({"model": {"d_model": 64}, "schedules": {}}, files=False)
    assert asked == []
    boot({"model": {"moe": {}}}, files=False)
    assert "moe" in asked and len(asked) == len(set(asked))


def test_a_section_of_a_plugin_that_is_not_installed_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("APT_DISABLE_PLUGIN_AUTOLOAD", "1")
    inner, outer = problems({"model": {"moe": {"experts": 4}}, "routing": {"exploration": 0.1}})
    if inner.key != "model.moe":
        inner, outer = outer, inner
    needs = "a plugin's needs the plugin"
    assert str(inner).endswith(f"unknown key (`apt-hooks schema` lists every key; {needs})")
    assert outer.message == "unknown key" and needs in outer.hint
    # One that was left out, and cannot be asked, may have it.
    for left_out in ({"plugins": [{"name": "no.such.voter", "on_failure": "isolate"}]}, {}):
        options = {} if left_out else {"plugins": ["no:voter"]}
        kernel = boot({**left_out, "model": {"voting": {"k": 5}}}, files=False, **options)
        (inactive,) = kernel.inactive
        assert (inactive.key, inactive.reason) == (
            "model.voting", f"{UNOWNED}; one that is blocked or broken may",
        )  # fmt: skip
        (problem,) = problems({**left_out, "trainng": {"max_epochs": 2}}, **options)
        assert "did you mean 'training'?" in str(problem)


def test_profiles_of_earlier_checkpoints_are_read() -> None:
    available = boot({"model": {"moe": {}}}, files=False).available
    plain = {"model": {"d_model": 64, "moe": None, "bistate": None, "voting": None}}
    config = saved_config(plain)
    assert config is not None and config.model.d_model == 64
    settings = {"enabled": True, "experts": 8, "top_k": 2, "capacity": 1.25, "balance_loss": 0.01}
    dense = {"model": {"moe": settings, "bistate": None}}
    assert saved_config(dense, available=available) == saved_config({})
    # Where the plugin was active, it had an effect.
    assert saved_config({**dense, "plugins": ["moe"]}, available=available) is None


def test_asking_them_imports_no_torch() -> None:
    import subprocess

    code = (
        "import sys; from apt_core.kernel import boot;"
        "boot({'model': {'moe': {}, 'bistate': {}}, 'routing': {}}, files=False);"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
