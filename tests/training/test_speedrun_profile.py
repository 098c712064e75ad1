"""The profile ``speedrun_cpu``, in a few of its steps; what it reaches is a benchmark's to say."""

from __future__ import annotations

import pytest


@pytest.fixture
def profile():
    """The name of the profile in place of the tiny one's path."""
    return "speedrun_cpu"


def few_steps(apt_train, *arguments, **options):
    run = apt_train(
        "--training.max_steps", "6", "--training.log_every_steps", "1",
        "--evaluation.sample_tokens", "70", "--hardware.num_threads", "1",
        *arguments, **options,
    )  # fmt: skip
    assert run.code == 0, run.err
    return run


def test_its_plan_shows_what_the_model_is_made_of(apt_train):
    run = apt_train("--dry-run")
    assert run.code == 0, run.err
    rows = {line.split()[0]: line.split() for line in run.out.splitlines() if line.strip()}
    assert rows["ngrams"][1] == f"{(4096 + 16384 + 16384) * 128:,}"
    assert {"muon", "relu2", "mha", "linear"} <= set(run.out.split())
    assert "inactive" not in run.out + run.err


def test_it_learns_from_the_first_steps_and_resumes_exactly(apt_train, differences):
    whole = few_steps(apt_train)
    losses = [row["loss"] for row in whole.metrics if "loss" in row]
    assert len(losses) == 6
    assert losses[0] == pytest.approx(5.545, abs=0.1) and losses[-1] < 2.9
    few_steps(apt_train, "--stop-at-step", "3", name="parts")
    parts = few_steps(apt_train, "--resume", name="parts")
    # The first part ends in an evaluation of its own, whose scores are the newest when it is saved.
    found = differences(whole.folder, parts.folder)
    assert "the state: scores" in found
    assert all(
        name.endswith("after step 3") for name in found if not name.startswith("the state: ")
    )
