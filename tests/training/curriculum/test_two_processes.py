"""A curriculum in two processes: as exact as in one, and the same training."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.training.curriculum.conftest import Curriculum

pytestmark = pytest.mark.long

IN_TWO = {"training.batch_size": 2}
KILLS = {"ddp": (6, 8, 11), "fsdp": (5, 9, 10)}
"""After these steps; experts come before 6, alignment before 9, the vote before 11: on either side
of each, by one of the two. A single process is killed after every step elsewhere."""


@pytest.mark.parametrize("sharding", KILLS)
def test_killed_and_resumed_is_in_one_go(
    curriculum: Curriculum, in_children, differences, killer, ranks, sharding: str
) -> None:
    """One run is killed after each of the steps, so that a resume goes on from a resume. Of the
    sharded one the layers are gathered in bf16, before the switch and after."""
    narrow = {"training.mixed_precision": sharding == "fsdp"}
    curriculum.settings = {**IN_TWO, **narrow, "hardware.distributed": sharding}
    assert in_children(*ranks(lambda: curriculum.train("whole"))) == [0, 0]
    saving = {"training.save_every_steps": 1}
    kills = KILLS[sharding]
    for n in kills:
        resume = n > kills[0]
        part = ranks(
            lambda n=n, resume=resume: curriculum.train(
                "killed", killer(n), changes=saving, resume=resume
            )
        )
        assert in_children(*part) == [-signal.SIGKILL] * 2
    assert in_children(*ranks(lambda: curriculum.train("killed", resume=True))) == [0, 0]
    assert "FSDP2 gathers" not in curriculum.log("whole")  # in fp32
    for n in kills:
        assert f"(step {n})" in curriculum.log("killed")
    assert differences(curriculum.folder / "whole", curriculum.folder / "killed") == []


DRAWS_NOTHING = {
    "model.dropout": 0.0,
    "routing.exploration": 0.0,
    # A capacity is that of a process in a micro-batch.
    "model.moe.dropless": True,
    "model.moe.dropless_steps": 100,  # the default, which is nobody's wish
    "schedules.moe_capacity": None,
}


def test_two_processes_train_as_one_does(curriculum: Curriculum, in_children, ranks) -> None:
    curriculum.settings = {**IN_TWO, **DRAWS_NOTHING, "training.seed": 1}
    alone = curriculum.train("alone", changes={"training.grad_accum_steps": 4})
    for sharding in KILLS:
        divided = {"hardware.distributed": sharding}
        together = ranks(lambda s=sharding, d=divided: curriculum.train(s, changes=d))
        assert in_children(*together) == [0, 0]
        lines = (curriculum.folder / sharding / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in lines.splitlines()]
        # Sums of fp32 in another order: over three seeds losses differed by 4e-6 at most.
        for figure in ("loss", "loss/cross_entropy", "loss/align.kl", "moe/max_violation"):
            expected = pytest.approx(values(alone.metrics, figure), rel=1e-5, abs=1e-6)
            assert values(rows, figure) == expected, sharding
        assert len(values(rows, "loss/align.kl")) > 4


@pytest.mark.parametrize("plugin", ["moe", "routing"])
def test_what_fails_in_one_process_alone_ends_both(
    curriculum: Curriculum, in_children, ranks, monkeypatch, capfd, plugin: str
) -> None:
    """Else the other one would wait for the first, or route by other biases."""
    curriculum.settings = IN_TWO
    name = {"moe": "statistics.sum_over_processes", "routing": "balancing.move_biases"}[plugin]

    def train() -> None:
        if os.environ["RANK"] == "1":
            monkeypatch.setattr(f"apt_plugins.{plugin}.{name}", lambda *_: 1 // 0)
        curriculum.train("run", strict=False)

    assert 0 not in in_children(*ranks(train))
    told = capfd.readouterr().err
    assert f"plugin {plugin} failed in on_step_end" in told
    assert "every process of it must do its part" in told


def values(rows: list[dict[str, Any]], figure: str) -> list[float]:
    return [row[figure] for row in rows if figure in row]
