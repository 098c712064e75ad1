"""The space file: what it says, and all that is wrong with it before anything runs."""

from __future__ import annotations

import pytest

from apt_core.errors import ConfigError
from apt_core.kernel import boot
from apt_core.testing.tiny import TINY_PROFILE
from apt_plugins.optuna.checking import check_metric, check_space
from apt_plugins.optuna.space import parse_space

PROFILE = TINY_PROFILE | {"data": {}}


def checked(text, profile=PROFILE, **options):
    def tried(overrides):
        return boot(profile, overrides=overrides, **options)

    kernel = boot(profile, **options)
    return check_space(parse_space(text), kernel, tried)


def problems(make, *arguments, **options):
    with pytest.raises(ConfigError) as error:
        make(*arguments, **options)
    return {f"{problem.where}: {problem}" for problem in error.value.problems}


def test_keys_are_written_with_dots_or_in_sections_and_numbers_as_in_a_profile():
    space = parse_space(
        "training.learning_rate: {low: 3e-5, high: 1e-2, log: true}\n"
        "training:\n  batch_size: [2, 4]\n  warmup_steps: {low: 0, high: 25, step: 10}\n"
        "model.tva.r: {low: 1, high: 4, when: {model.attention_name: [tva_default]}}\n"
        "model: {attention_name: [tva_default, mha]}\n"
    )
    rate, batch, warmup, attention, rank = space
    assert (rate.kind, rate.low, rate.log) == ("float", 3e-5, True)
    assert (batch.choices, warmup.high, warmup.kind) == ((2, 4), 20, "int")
    assert rank.key == "model.tva.r" and attention.key == "model.attention_name"  # parents first
    assert rank.is_searched({"model.attention_name": "tva_default"})
    assert not rank.is_searched({"model.attention_name": "mha"})
    assert space.contains({"training.learning_rate": 1e-3} | VALUES)
    assert not space.contains(VALUES | {"training.learning_rate": 1.0})
    assert not space.contains(VALUES | {"training.learning_rate": 1e-3, "model.tva.r": 2})
    assert "in steps of 10" in warmup.in_words() and "when" in rank.in_words()


VALUES = {"training.batch_size": 4, "training.warmup_steps": 20, "model.attention_name": "mha"}


def test_choices_may_be_anything_and_keep_their_spelling():
    space = parse_space("training.betas: [[0.9, 0.95], [0.9, 0.99]]\nmodel.x: [1e3, null, true, 1]")
    betas, other = space
    assert betas.labels == ("[0.9, 0.95]", "[0.9, 0.99]")
    assert betas.override("[0.9, 0.99]").value == [0.9, 0.99]
    assert other.override(1000.0).texts == {(): "1e3"}
    assert other.override(1).value == 1 and other.override(True).value is True


def test_everything_that_is_wrong_with_the_file_is_told_at_once():
    text = (
        "a.b: 3\n"
        "a.c: {low: 1}\n"
        "a.d: {low: 2, high: 1}\n"
        "a.e: {low: 0, high: 1, log: true}\n"
        "a.f: {low: 1, high: 2, logg: true}\n"
        "a.g: [1]\n"
        "a.h: [1, 1]\n"
        "a.i: {low: x, high: .inf}\n"
        "a.j: {low: 1, high: 2, step: 0.5, log: true}\n"
        "a.k: {low: 1, high: 2, step: 3}\n"
        "a.l: {low: 1, high: 2, when: {a.m: 1}}\n"
        "a.n: {choices: [1, 2], when: {a.n: 1}}\n"
        "'a..o': [1, 2]\n"
        "a.p: {low: 1, high: 2, log: 3}\n"
        "a: {q: {low: 1, high: 2}, q: {low: 1, high: 2}}\n"
    )
    found = "\n".join(problems(parse_space, text))
    for key in "bcdefghijklnp":
        assert f"a.{key}: " in found, key
    assert "did you mean 'log'" in found and "space.yaml:4" in found
    assert "a..o" in found and "a.q" in found
    for text in ("", "3", "- 1", "{}", "a.b: {low: 1, high: 2"):
        assert problems(parse_space, text)


def test_the_profile_judges_every_value_and_key():
    text = (
        "training.learning_rte: {low: 1e-5, high: 1e-2}\n"
        "training.batch_size: {low: 0.5, high: 2}\n"
        "model.dropout: {low: 0.1, high: 1.5}\n"
        "model.attention_name: [mha, flush]\n"
        "nowhere.at_all: [1, 2]\n"
        "model.num_layers: {low: 1, high: 2}\n"
    )
    found = "\n".join(problems(checked, text))
    assert "space.yaml:1" in found and "did you mean 'learning_rate'" in found
    assert "training.batch_size" in found and "model.dropout" in found
    assert "flush" in found and "nowhere" in found
    assert "num_layers" not in found


def test_a_range_of_a_float_key_is_one_of_floats_however_its_ends_are_written():
    rate, layers, both = checked(
        "model.dropout: {low: 0, high: 0.5}\nmodel.num_layers: {low: 1, high: 2}\n"
        "training.weight_decay: {low: 0, high: 1}"
    ).space
    assert (rate.kind, layers.kind, both.kind) == ("float", "int", "float")


def test_values_that_fit_each_other_only_are_taken():
    text = "model.d_model: [16, 24]\nmodel.num_heads: [2, 3]"
    assert len(checked(text).space) == 2  # 3 heads divide 24, and not the profile's own 16
    found = "\n".join(problems(checked, "model.num_heads: [2, 3]"))
    assert "num_heads" in found


def test_a_key_that_nothing_reads_is_no_dimension():
    profile = PROFILE | {"model": TINY_PROFILE["model"] | {"attention_name": "mha"}}
    found = "\n".join(problems(checked, "model.tva.r: [1, 2]", profile))
    assert "nothing reads it" in found
    text = "model.attention_name: [mha, tva_default]\n"
    text += "model.tva.r: {choices: [1, 2], when: {model.attention_name: tva_default}}"
    assert len(checked(text, profile).space) == 2


def test_sections_and_switches_of_plugins_are_dimensions():
    text = (
        "schedules.enable_moe_at_epoch: [1, 2]\nmodel.moe.experts: [2, 4]\n"
        "training.seed: {low: 0, high: 3}\ndata.val_fraction: {low: 0.05, high: 0.2}"
    )
    told = checked(text, plugins=["moe"])
    assert [each.kind for each in told.space] == ["choice", "choice", "int", "float"]
    assert "data.val_fraction" in told.notices[0]
    assert "moe" in "\n".join(problems(checked, text))


def test_a_metric_is_one_that_evaluations_have():
    kernel = boot(PROFILE)
    assert not [*check_metric(kernel, "val_bpb")]
    assert "did you mean 'val_loss'" in str(*check_metric(kernel, "val_los"))
    assert "evaluation.tasks" in str(*check_metric(kernel, "task/sums/accuracy"))
