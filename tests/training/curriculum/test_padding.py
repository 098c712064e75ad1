"""A curriculum on prompts and responses, packed or padded: padding changes nothing, nor does how a
step is divided."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from apt_core.testing import TinyRun

if TYPE_CHECKING:
    from tests.training.curriculum.conftest import Curriculum

SETTINGS: dict[str, Any] = {
    "model.max_seq_len": 48,
    "model.dropout": 0.0,
    "routing.exploration": 0.0,
    "data.max_length": 24,
    "training.batch_size": 4,
    "training.ema_decay": 0.8,
    "evaluation.metrics": ["accuracy", "reasoning_quality"],
    "evaluation.eval_freq": 0,
    "evaluation.sample_tokens": 0,
}
"""Nothing is drawn, so that runs of other shapes can be compared; an epoch has five steps, of which
the last has fewer windows."""

PAD = {"data.packing": "pad", "data.padding": "max_length"}
PACKED = {
    "data.packing": "documents",
    # One layer gets the ids of documents, the other a boolean mask.
    "model.attention_pattern": ["flex", "tva_default"],
    "model.flex.window": 5,
}

EACH_ALONE = {
    # The capacity is that of a micro-batch.
    "model.moe.dropless": True,
    "model.moe.dropless_steps": 100,
    "schedules.moe_capacity": None,
    # So are the loads and the tokens that these terms compare with each other.
    "model.moe.balance_loss": 0.0,
    "model.moe.z_loss": 0.0,
    "model.bistate.beta": 0.0,
    # While experts are alike, the gradient of a router is rounding, which Adam would scale up: on
    # some processors a token then goes to another expert.
    "training.eps": 1e-4,
}
"""No token depends on others beside it."""


def write_pairs(folder: Path) -> None:
    rows = [
        {"prompt": f"{n}+{n * 7 % 5}=", "response": "ab" * (1 + n * n % 4) + str(n + n * 7 % 5)}
        for n in range(46)
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines[:38]), encoding="utf-8")
    (folder / "val.jsonl").write_text("".join(lines[38:]), encoding="utf-8")


@pytest.fixture
def pairs(curriculum: Curriculum) -> Curriculum:
    write_pairs(curriculum.folder)
    paths = {
        f"data.{side}_path": str(curriculum.folder / f"{side}.jsonl") for side in ("train", "val")
    }
    curriculum.settings = {**SETTINGS, **paths, "model.vocab_size": 260}
    return curriculum


CLOCK = ("time/", "memory", "tokens", "mfu")


def figures(run: TinyRun) -> list[dict[str, float]]:
    """The rows of metrics without what depends on the clock or on the length of rows."""
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in run.metrics]


def require_alike(run: TinyRun, other: TinyRun) -> None:
    assert len(run.metrics) == len(other.metrics)
    for own, others in zip(figures(run), figures(other), strict=True):
        assert own == pytest.approx(others, rel=1e-4, abs=1e-5)
    for name, weight in run.weights.items():
        # While experts are alike, the gradient of a router is rounding, which Adam scales up.
        if "router" not in name:
            assert (weight - other.weights[name]).abs().max() < 1e-4, name


def test_padding_changes_nothing(pairs: Curriculum) -> None:
    """Neither losses nor loads, drops, biases, averages, the switch or scores; with a capacity."""
    short = pairs.train("short", changes=PAD)
    rows = [row for row in short.metrics if "loss" in row]
    assert len(rows) == 15 and rows[-1]["moe/drop_rate"] > 0
    assert {"loss/align.kl", "loss/align.info_nce", "loss/moe.balance"} <= set(rows[-1])
    for name, changes in {
        "wide": {**PAD, "data.max_length": 48},
        "longest": {**PAD, "data.padding": "longest"},
    }.items():
        other = pairs.train(name, changes=changes)
        require_alike(other, short)
        (switch,), (short_switch,) = other.manifest["switches"], short.manifest["switches"]
        for side in ("loss_before", "loss_after"):
            assert switch[side] == pytest.approx(short_switch[side], rel=1e-6)


KILLS = {"pad": (5, 8, 10), "documents": (3, 6, 8)}
"""Before the switch to experts, alignment and the vote, in the order of steps."""

SAME = {"loss", "loss/align.kl", "val_loss", "val_reasoning_quality"}


@pytest.mark.parametrize("packing", [pytest.param(PAD, marks=pytest.mark.long), PACKED], ids=KILLS)
def test_a_step_is_the_same_however_it_is_divided(
    pairs: Curriculum, in_children, ranks, packing: dict[str, Any]
) -> None:
    """Into micro-batches, or between two processes, of which one gets none in the last step; each
    micro-batch has another number of targets."""
    pairs.settings |= {**EACH_ALONE, **packing}
    shape = {"training.batch_size": 8, "training.grad_accum_steps": 1}
    whole = pairs.train("whole", changes=shape)
    shape = {"training.batch_size": 2, "training.grad_accum_steps": 4}
    require_alike(pairs.train("parts", changes=shape), whole)
    shape |= {"training.grad_accum_steps": 2, "hardware.distributed": "ddp"}
    assert in_children(*ranks(lambda: pairs.train("two", changes=shape))) == [0, 0]
    lines = (pairs.folder / "two" / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len(rows) == len(whole.metrics)
    for row, expected in zip(rows, whole.metrics, strict=True):
        assert row.keys() == expected.keys()
        for figure in SAME & row.keys():
            assert row[figure] == pytest.approx(expected[figure], rel=5e-6, abs=1e-6), figure


@pytest.mark.parametrize("packing", [pytest.param(PAD, marks=pytest.mark.long), PACKED], ids=KILLS)
def test_a_run_that_is_killed_before_each_switch_is_one_in_one_go(
    pairs: Curriculum, in_children, differences, killer, packing: dict[str, Any]
) -> None:
    """With a capacity, noise, dropout and an average."""
    pairs.settings |= {**packing, "model.dropout": 0.1, "routing.exploration": 0.5}
    whole = pairs.train("whole")
    switched = sorted({e["step"] - 1 for e in whole.manifest["timeline"] if e["step"] > 1})
    kills = KILLS[packing["data.packing"]]
    assert tuple(switched) == kills
    saving = {"training.save_every_steps": 1}
    for n in kills:
        kill, resume = killer(n, micro=1), n > kills[0]
        part = partial(pairs.train, "killed", kill, changes=saving, resume=resume)
        assert in_children(part) == [-signal.SIGKILL]
    pairs.train("killed", resume=True)
    assert differences(pairs.folder / "whole", pairs.folder / "killed") == []
