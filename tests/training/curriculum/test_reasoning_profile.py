"""The shipped profile ``gpt5_moe_reasoning`` on prompts and responses, at sizes of a test."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.runs import open_run

PROFILE = "gpt5_moe_reasoning"
ROWS = {"train": 25, "val": 4}
LENGTH = 64
SIZES = {
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.d_ff": 32,
    "model.vocab_size": 260,
    "model.max_seq_len": LENGTH,
    "model.moe.experts": 4,
    "data.max_length": LENGTH,
    "training.batch_size": 8,
    "training.max_epochs": 6,
    "training.log_every_steps": 1,
    "evaluation.sample_tokens": 4,
    "hardware.device": "cpu",
    "hardware.num_gpus": 0,
    "hardware.num_threads": 1,
    "hardware.distributed": "false",
}
"""An epoch has three steps: experts come before step 4, alignment before 7, the vote before 13."""

OPTIONS = [option for key, value in SIZES.items() for option in ("--set", f"{key}={value}")]

ENABLED = [("moe", 2, 4), ("align", 3, 7), ("voter", 5, 13)]

WATCH = """
import json
from apt_core import hookimpl

@hookimpl
def on_step_start(step, batch, trainer):
    names = ("input_ids", "targets")
    rows = [[getattr(part, name).tolist() for name in names] for part in batch]
    with open(trainer.output_dir / "seen.jsonl", "a") as file:
        file.write(json.dumps(rows) + "\\n")
"""


def problem(draw: random.Random) -> dict[str, str]:
    a, b = draw.randrange(2, 50), draw.randrange(2, 50)
    if draw.random() < 0.5:
        return {"prompt": f"{a} + {b}?", "response": f"The answer is {a + b}."}
    asked = f"Ana has {a} pears, buys {b}."
    return {"prompt": asked, "response": f"{a} + {b} = {a + b}"}


def write_problems(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Of those to train on one has too long a response, and one so long a prompt that nothing of
    its response is left."""
    draw, made = random.Random(22), {}
    folder.mkdir()
    for side, count in ROWS.items():
        rows = [problem(draw) for _ in range(count)]
        if side == "train":
            rows[3]["response"] += " as is well known" * 4
            rows[7]["prompt"] += " And then?" * 8
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"reasoning_{side}.jsonl").write_text(lines, encoding="utf-8")
        made[side] = rows
    return made


@pytest.fixture
def problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, curriculum: Any
) -> dict[str, list[dict[str, str]]]:
    monkeypatch.chdir(tmp_path)
    return write_problems(tmp_path / "data")


def test_it_trains_as_it_says(problems, apt_train, tmp_path: Path) -> None:
    (tmp_path / "watch.py").write_text(WATCH, encoding="utf-8")
    run = apt_train(*OPTIONS, "--plugin", "watch.py", of=PROFILE)
    assert run.code == 0, run.err
    told = [line for line in run.out.splitlines() if line.startswith("inactive: ")]
    expected = {"training.amp_level", "hardware.backend"}
    if find_spec("tensorboard") is None:
        expected.add("monitoring.tensorboard.enabled")
    else:
        assert [*(tmp_path / "logs" / "gpt5_moe" / run.folder.name).glob("events.out.*")]
    assert {line.split()[1] for line in told} == expected
    assert "data.truncation leaves out" in run.out
    assert f"1 of {ROWS['train']} documents, of whose first {LENGTH} tokens nothing" in run.out
    assert "to evaluate on, with" not in run.out  # none of them is too long

    enabled = [(e["plugin"], e["epoch"], e["step"]) for e in run.manifest["timeline"]
               if e["event"] == "enabled" and e["step"] > 1]  # fmt: skip
    assert enabled == ENABLED
    rows = [row for row in run.metrics if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 19))
    assert all(("loss/moe.balance" in row) == (row["step"] >= 4) for row in rows)
    assert all(("loss/align.kl" in row) == (row["step"] >= 8) for row in rows)  # 0 in the first
    whole = [row for row in run.metrics if "val_loss" in row]
    assert len(whole) >= 6 and all(0 <= row["val_reasoning_quality"] <= 1 for row in whole)
    assert whole[-1]["val_loss"] < whole[0]["val_loss"]
    assert ", accuracy " in run.out and ", reasoning quality " in run.out
    assert "val_reasoning_quality: " in run.out.split("held-out text")[1]
    require_answers_alone(run.folder / "seen.jsonl", problems["train"])
    assert open_run(run.folder, weights="best").position.step == whole[-1]["step"] == 18


def require_answers_alone(file: Path, rows: list[dict[str, str]]) -> None:
    """Every row of a step is one document, filled up; what is learned of it is its answer, cut
    where the row ends."""
    tokenizer = ByteTokenizer()
    pad, eos = tokenizer.special.pad, tokenizer.special.eos
    expected = {}
    for row in rows:
        prompt = tokenizer.encode(row["prompt"] + "\n")
        ids = [*prompt, *tokenizer.encode(row["response"]), eos]
        learned = [-100] * (len(prompt) - 1) + ids[len(prompt) :]
        inputs = (ids[:-1] + [pad] * LENGTH)[:LENGTH]
        expected[tuple(inputs)] = (learned + [-100] * LENGTH)[:LENGTH]
    seen = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    of_epoch = {
        tuple(ids): targets
        for parts in seen[:3]
        for ids_of_part, targets_of_part in parts
        for ids, targets in zip(ids_of_part, targets_of_part, strict=True)
    }
    learned = {ids: targets for ids, targets in expected.items() if set(targets) != {-100}}
    assert len(learned) == ROWS["train"] - 1
    assert of_epoch == learned


@pytest.mark.long
@pytest.mark.usefixtures("forked")
def test_a_resume_is_bit_exact(problems, apt_train) -> None:
    """With a SIGKILL right before the vote begins; here an epoch has one step."""
    sizes = ["--set", "training.batch_size=24", "--set", "training.max_epochs=8"]
    run = apt_train(*OPTIONS, *sizes, "--verify-resume", "--stop-at-step", "8", of=PROFILE)
    assert run.code == 0, run.err
    assert "bit-equal: " in run.out and "nothing was compared" not in run.out


def test_a_plan_without_its_files_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apt_train
) -> None:
    monkeypatch.chdir(tmp_path)
    run = apt_train(*OPTIONS, "--dry-run", of=PROFILE)
    assert run.code == 0, run.err
    for side in ROWS:
        path = f"./data/reasoning_{side}.jsonl"
        line = f"missing here: data.{side}_path: there is no file '{path}'\n"
        assert run.out.count(line) == 1
        assert run.out.count("no file") == 2 and "cannot be read" not in run.out
    refused = apt_train(*OPTIONS, of=PROFILE)
    assert refused.code == 2 and "without val_path, a share of train_path" in refused.err
