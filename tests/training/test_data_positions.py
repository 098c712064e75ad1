"""What a run sees is a function of its seed and step alone, wherever it was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_core import AptError, hookimpl
from apt_core.cache import cache_dir
from apt_core.cli.run_command import run_command
from apt_core.data.store.format import DamagedStoreError
from apt_core.runs import open_run
from apt_core.testing import TINY_PROFILE, TinyRun, tiny_run
from apt_plugins.report.command import app as report

pytestmark = pytest.mark.long

WORDS = ["apples", "pears", "make", "pieces", "of", "fruit", "and", "some", "more", "nuts"]

SETTINGS = {
    "model.max_seq_len": 32,
    "training.batch_size": 2,
    "training.grad_accum_steps": 4,
    "training.log_every_steps": 1,
    "training.keep_last": 0,
    "training.save_every_steps": 1,
    "evaluation.eval_freq": 0,
    "evaluation.sample_tokens": 0,
    "hardware.num_threads": 1,
}

KINDS = ("concat", "pad", "mixture")
"""The packings of one source that have code of their own, and a mixture, which is packed by
documents."""


def text(number: int, length: int) -> str:
    return " ".join(WORDS[(number * 7 + n * n) % len(WORDS)] for n in range(length)) + f" {number}"


def write_data(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    texts = [{"text": text(n, 2 + n % 5)} for n in range(44)]
    pairs = [{"prompt": text(n, 1 + n % 2), "response": text(n + 3, 1 + n % 3)} for n in range(44)]
    for name, records in (("texts", texts), ("pairs", pairs)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "story.txt").write_text(text(1, 80), encoding="utf-8")


def data_of(kind: str, folder: Path) -> dict[str, Any]:
    """The settings of a kind of data."""
    texts = {"loader": "jsonl", "train_path": str(folder / "texts.jsonl")}
    pairs = {"loader": "jsonl", "train_path": str(folder / "pairs.jsonl")}
    if kind == "mixture":
        story = {"name": "story", "train_path": str(folder / "story.txt")}
        items = [{"name": "texts", **texts}, {"name": "pairs", **pairs, "weight": 2.0}, story]
        return {"mixture": items, "packing": "documents"}
    return {"packing": kind, "padding": "longest" if kind == "pad" else None, **texts}


class Looks:
    """Keeps what each step of a run sees in a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @hookimpl
    def on_step_start(self, step: int, batch: list[Any], trainer: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        names = ("input_ids", "targets", "document_ids", "is_token")
        seen = [[getattr(b, n) for n in names] for b in batch]
        lists = [[None if t is None else t.tolist() for t in tensors] for tensors in seen]
        place = self.folder / f"{step:03d}-{trainer.rank}.json"
        place.write_text(json.dumps(lists), encoding="utf-8")


@dataclass
class Trial:
    """A kind of data, trained on as often as asked in folders of its own."""

    folder: Path
    kind: str

    def train(self, name: str, *plugins: Any, changes: Any = (), **options: Any) -> TinyRun:
        data = {"max_length": 24, "val_fraction": 0.2, **data_of(self.kind, self.folder / "data")}
        schedules: dict[str, Any] = {}
        if self.kind == "mixture":
            ramp = {"start": 0.2, "end": 3.0, "by": "step"}
            schedules = {"mixture_texts": ramp, "enable_story_at_step": 4}
        return tiny_run(
            *plugins,
            profile={**TINY_PROFILE, "data": data, "schedules": schedules},
            overrides={**SETTINGS, **dict(changes)},
            output=self.folder / name,
            **options,
        )

    def looks(self, name: str) -> Looks:
        return Looks(self.folder / f"{name}.seen")

    def rows(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def seen(self, name: str) -> dict[str, Any]:
        files = sorted((self.folder / f"{name}.seen").iterdir())
        return {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def trials(tmp_path_factory) -> dict[str, Trial]:
    """A trial of each kind by its name, with a run in one go in the folder ``whole``."""
    made = {}
    for kind in KINDS:
        made[kind] = Trial(tmp_path_factory.mktemp(kind), kind)
        write_data(made[kind].folder / "data")
        made[kind].train("whole", made[kind].looks("whole"))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_sees_what_it_would_have_seen(
    trials, in_children, differences, killer, kind
):
    """In the middle of an epoch and at its border, with any number of workers, and with the store
    deleted between."""
    trial = trials[kind]
    whole = trial.seen("whole")
    per_epoch = len(whole) // 2
    assert per_epoch >= 4
    assert whole["001-0.json"] != whole[f"{per_epoch + 1:03d}-0.json"]
    for workers, n in enumerate((2, per_epoch, per_epoch + 1)):
        name = f"killed-{n}"
        before = {"data.num_workers": workers}
        kills = killer(n, micro=1)
        looks = trial.looks(name)
        run = lambda: trial.train(name, looks, kills, changes=before)  # noqa: B023, E731
        assert in_children(run) == [-signal.SIGKILL]
        if n == 2:
            stores = cache_dir() / "stores"
            shutil.rmtree(stores)
        after = {"data.num_workers": (workers + 1) % 3, "data.build_workers": 1 + workers}
        trial.train(name, looks, changes=after, resume=True)
        assert trial.seen(name) == whole
        assert differences(trial.folder / "whole", trial.folder / name) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("apt-batches")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_goes_on_in_another_number_of_processes(
    trials, in_children, killer, ranks, kind
):
    """In one process, from step 3 on in two, from step 6 on in four, and from step 8 on in one
    again: together they see in each step what a run in one process does, and learn the same."""
    trial = trials[kind]
    parts = ((1, 2, 0), (2, 5, 1), (4, 7, 0), (1, None, 1))
    for processes, killed, workers in parts:
        looks, last = trial.looks(f"in-{processes}"), killed is None
        plugins = [looks] if last else [looks, killer(killed, micro=1)]
        changes = {
            "training.grad_accum_steps": 4 // processes,
            "data.num_workers": workers,
            "hardware.distributed": processes > 1,
        }
        options = {"changes": changes, "resume": killed != 2}
        run = partial(trial.train, "moving", *plugins, **options)
        expected = [0 if last else -signal.SIGKILL] * processes
        assert in_children(*ranks(run, processes)) == expected
    whole, steps = trial.seen("whole"), {1: [1, 2, 3], 2: [3, 4, 5, 6], 4: [6, 7, 8]}
    assert len(whole) > 8
    for processes, taken_in in steps.items():
        seen = trial.seen(f"in-{processes}")
        for step in taken_in:
            shares = [seen[f"{step:03d}-{rank}.json"] for rank in range(processes)]
            # Micro-batch i is that of process i % processes; one of padding has no target.
            turns = [batch for turn in zip_longest(*shares) for batch in turn if batch is not None]
            taken = [b for b in turns if any(t != -100 for row in b[1] for t in row)]
            assert taken == whole[f"{step:03d}-0.json"], (processes, step)
    alone = trial.seen("in-1")
    assert alone == {name: whole[name] for name in alone} and len(alone) == len(whole) - 4
    rows = [[row for row in trial.rows(name) if "loss" in row] for name in ("whole", "moving")]
    for key in ("step", "epoch", "tokens"):
        assert [row[key] for row in rows[0]] == [row[key] for row in rows[1]]
    for key in ("loss", "grad_norm"):  # fp32, added in another order
        assert [row[key] for row in rows[1]] == pytest.approx([r[key] for r in rows[0]], rel=1e-5)
    one, other = (open_run(trial.folder / n, plugins="no:looks").model for n in ("whole", "moving"))
    torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=1e-4, atol=1e-6)


REFUSED = {
    "packing": ("mixture", {"data.packing": "concat"}, r"data\.packing: is 'concat'"),
    "windows": ("concat", {"data.max_length": 23}, r"data\.max_length: is 23"),
    "padding": ("pad", {"data.padding": "max_length"}, r"data\.padding: is 'max_length'"),
    "truncation": ("pad", {"data.truncation": True}, r"data\.truncation: is True"),
    "split": ("concat", {"data.val_fraction": 0.4}, r"data\.val_fraction: is 0\.4"),
    "chars": ("concat", {"data.min_chars": 30}, r"data\.min_chars: is 30"),
    "seed": ("concat", {"training.seed": 7}, r"training\.seed: is 7"),
    "tokenizer": (
        "concat",
        {"data.tokenizer_name": "char", "model.vocab_size": 300},
        r"data\.tokenizer_name: is 'char'",
    ),
    "weight": (
        "mixture",
        {"data.mixture": "another"},
        r"data\.mixture: is \[.*it changes how the weights train",
    ),
    "ramp": (
        "mixture",
        {"schedules.mixture_texts": {"start": 0.2, "end": 2.0, "by": "step"}},
        r"schedules\.mixture_texts\.end: is 2\.0",
    ),
    "start": ("mixture", {"schedules.enable_story_at_step": 5}, r"enable_story_at_step: is 5"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_resume_on_other_data_is_refused_and_names_the_key(trials, what):
    kind, changes, message = REFUSED[what]
    trial = trials[kind]
    if changes.get("data.mixture"):
        items = data_of(kind, trial.folder / "data")["mixture"]
        changes = {"data.mixture": [{**item, "weight": 5.0} for item in items[:1]] + items[1:]}
    with pytest.raises(AptError, match=message):
        trial.train("whole", changes=changes, resume=True)


def test_a_longer_run_whose_ramp_was_another_is_refused(trials):
    with pytest.raises(AptError, match=r"training\.max_epochs: is 4"):
        trials["mixture"].train("whole", changes={"training.max_epochs": 4}, resume=True)


def test_a_resume_on_a_changed_file_is_refused(trials):
    trial = trials["pad"]
    shutil.copytree(trial.folder, trial.folder.with_name("changed"))
    changed = Trial(trial.folder.with_name("changed"), "pad")
    moved = changed.train("whole", resume=True)  # the same texts at another place
    assert moved.result.status == "finished"
    with (changed.folder / "data" / "texts.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(AptError, match=r"data\.train_path: .*another text is read there"):
        changed.train("whole", resume=True)


def test_a_run_of_an_earlier_order_is_read_but_not_resumed(trials, seal):
    trial = trials["concat"]
    old = trial.folder / "old"
    shutil.copytree(trial.folder / "whole", old)
    for checkpoint in (old / "checkpoints").iterdir():
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        del state["windows"]
        (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
        seal(checkpoint)
    with pytest.raises(AptError, match="windows came in another order than now"):
        trial.train("old", resume=True)
    assert open_run(old, plugins="no:looks").position.step == len(trial.seen("whole"))
    assert run_command(report, "apt-report", [str(old)]) == 0


class Fails:
    @hookimpl
    def on_step_end(self, trainer: Any) -> None:
        raise ValueError("boom")


def test_threads_end_with_a_run_that_fails(trials):
    with pytest.raises(AptError, match="boom"):
        trials["mixture"].train("fails", Fails(), changes={"data.num_workers": 2})
    assert not [t for t in threading.enumerate() if t.name.startswith("apt-batches")]


class Damages:
    """Takes away the end of what the store of a source has, in the middle of a run."""

    @hookimpl
    def on_step_end(self, step: int, trainer: Any) -> None:
        if step == 3:
            source = next(s for s in trainer.data.sources if s.name == "pairs")
            for path in source.store.folder.glob("train-*.ids"):
                os.truncate(path, 1)


def test_a_store_that_is_damaged_in_mid_run_is_named_with_its_source(trials, monkeypatch):
    """In a thread that makes batches too; all that was learned is saved."""
    monkeypatch.setattr("apt_core.data.loading.IN_MEMORY", 0)
    trial, damages = trials["mixture"], Damages()
    told = r"data\.mixture, source pairs: .*train-00000\.ids is shorter than it was"
    for workers in (0, 1):
        name = f"damaged-{workers}"
        with pytest.raises(DamagedStoreError, match=told):
            trial.train(name, damages, changes={"data.num_workers": workers})
        trial.train(name, damages, trial.looks(name), resume=True)  # built anew
        missing = sorted(trial.seen("whole").keys() - trial.seen(name).keys())
        assert f"{missing[-1][:3]}" >= "003"
        assert trial.seen(name).items() <= trial.seen("whole").items()
        assert trial.rows(name)[-1]["step"] == trial.rows("whole")[-1]["step"]


def test_two_runs_in_one_process_have_data_of_their_own(trials):
    class Trains:
        @hookimpl
        def on_step_end(self, step: int, trainer: Any) -> None:
            if step == 2:
                other = trials["mixture"]
                other.train("inner", other.looks("inner"))

    trial = trials["concat"]
    trial.train("outer", trial.looks("outer"), Trains(), changes={"data.num_workers": 1})
    assert trial.seen("outer") == trial.seen("whole")
    assert trials["mixture"].seen("inner") == trials["mixture"].seen("whole")
