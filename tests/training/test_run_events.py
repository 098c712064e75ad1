"""What happens in a run is in its events.jsonl, as data, whatever becomes of the run."""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from apt_core import ProviderSpec, StopTraining, hookimpl
from apt_core.runs import folder as run_folder
from apt_core.runs.events import KINDS, read_events
from apt_core.runs.rows import RowFile
from apt_core.testing import tiny_run

QUIET = {"evaluation.eval_freq": 0, "evaluation.sample_tokens": 0, "training.log_every_steps": 1}


def train(folder: Path, *plugins: Any, steps: int | None = 6, changes: Any = (), **options: Any):
    return tiny_run(
        *plugins,
        steps=steps,
        output=folder,
        strict=False,
        overrides={**QUIET, **dict(changes)},
        **options,
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    for row in found:
        fields = set(re.findall(r"`(\w+)`", KINDS[row["kind"]]))
        if row["kind"] == "resumed":
            fields |= set(re.findall(r"`(\w+)`", KINDS["started"]))
        assert {*row} - {"time", "step", "kind", "message"} <= fields, row
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["time"])
    return found


def told(folder: Path) -> list[tuple[str, int]]:
    return [(row["kind"], row["step"]) for row in rows(folder)]


def test_a_run_without_plugins_tells_its_start_checkpoints_epochs_and_end(tmp_path):
    changes = {"training.save_every_steps": 2, "training.keep_last": 1, "training.save_freq": 0}
    train(tmp_path / "run", changes=changes)
    found = told(tmp_path / "run")
    assert (found[0], found[-1]) == (("started", 0), ("ended", 6))
    # They are told of once they are written, which the run does not wait for.
    assert [row for row in found if row[0] == "saved"] == [("saved", n) for n in (2, 4, 6)]
    deleted = [row["checkpoint"] for row in rows(tmp_path / "run") if row["kind"] == "deleted"]
    assert sorted(deleted) == ["step-00000002", "step-00000004"]
    start, *_, end = rows(tmp_path / "run")
    assert (start["device"], start["processes"], start["plugins"]) == ("cpu", 1, [])
    assert start["parameters"] > 1000
    assert (end["status"], end["reason"]) == ("finished", "")
    log = (tmp_path / "run" / "log.txt").read_text()
    # Every line of an event is that of the log; what the log leaves out at its level is not.
    for row in rows(tmp_path / "run"):
        assert (row["message"] in log) == (row["kind"] not in ("deleted", "ended"))
    whole = train(tmp_path / "epoch", steps=None, changes={"training.max_epochs": 1})
    (epoch,) = (row for row in rows(tmp_path / "epoch") if row["kind"] == "epoch_ended")
    assert (epoch["epoch"], epoch["step"]) == (1, whole.result.step)


SAVING = {"training.save_every_steps": 2, "training.keep_last": 0}


def test_a_run_that_is_killed_twice_says_what_was_taken_again(tmp_path, in_children, killer):
    run = tmp_path / "run"

    def killed(n, **options):
        plugin = killer(n, micro=1, saved=n - 1)
        return lambda: train(run, plugin, changes=SAVING, steps=10, **options)

    assert in_children(killed(5)) == [-signal.SIGKILL]
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time": "2026')  # as a disk that was full before the kill leaves it
    assert in_children(killed(7, resume=True)) == [-signal.SIGKILL]
    train(run, changes=SAVING, steps=10, resume=True)
    events = read_events(run)
    assert [(event.kind, event.step) for event in events.events if event.kind != "saved"] == [
        ("started", 0), ("rewound", 4), ("resumed", 4), ("rewound", 6), ("resumed", 6),
        ("ended", 10),
    ]  # fmt: skip
    assert events.lost == []
    assert events.notes == ["1 lines of events.jsonl cannot be read and are left out"]
    rewound = [event.data["from_step"] for event in events.events if event.kind == "rewound"]
    assert rewound == [5, 7]


def test_a_run_that_is_resumed_in_another_folder_names_its_checkpoint(tmp_path):
    train(tmp_path / "run", changes=SAVING)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    path = tmp_path / "moved" / "checkpoints" / "step-00000004"
    train(tmp_path / "fork", changes={**SAVING, "training.gradient_clip": 0.5}, resume_from=path,
          allow_change=("training.gradient_clip",))  # fmt: skip
    changed, resumed, *_ = rows(tmp_path / "fork")
    assert (changed["kind"], changed["key"]) == ("changed", "training.gradient_clip")
    assert (changed["before"], changed["after"]) == (1.0, 0.5)
    assert (resumed["kind"], resumed["step"]) == ("resumed", 4)
    assert Path(resumed["checkpoint"]) == path
    # In the folder itself what came later is out of the way.
    train(tmp_path / "moved", changes=SAVING, resume_from=path)
    found = rows(tmp_path / "moved")
    at = [row["kind"] for row in found].index("set_aside")
    aside, rewound, resumed = found[at : at + 3]
    assert (aside["kind"], aside["checkpoint"]) == ("set_aside", "step-00000006")
    assert (tmp_path / "moved" / "checkpoints" / aside["name"]).is_dir()
    assert (rewound["kind"], rewound["step"], rewound["from_step"]) == ("rewound", 4, 6)
    assert resumed["kind"] == "resumed"


class Fails:
    """Fails with what a stranger's message may hold."""

    @hookimpl
    def on_step_end(self, step):
        raise ValueError("naïve \x1b[2J \udcff 雪 https://ann:a-password@host " + "x" * 10**5)


class Unusable:
    @hookimpl
    def apt_register_providers(self):
        def build(settings):
            raise RuntimeError("no such chip")

        return [ProviderSpec("norm", "fragile", build)]


class Voids:
    @hookimpl
    def on_backward_end(self, step, trainer):
        if step in (2, 3):
            next(trainer.model.parameters()).grad.fill_(float("nan"))


class Stops:
    @hookimpl
    def on_step_end(self, step):
        if step == 4:
            raise StopTraining("enough of it")


def test_what_goes_wrong_is_told_with_what_came_of_it(tmp_path):
    run = tmp_path / "run"
    train(run, Fails(), Unusable(), Voids(), Stops(), changes={"model.norm_name": "fragile"})
    found = rows(run)
    by_kind = {row["kind"]: row for row in found}
    # Some of it before there was a folder.
    kinds = [row["kind"] for row in found]
    assert kinds[:4] == ["failed", "quarantined", "fell_back", "started"]
    back = by_kind["fell_back"]
    assert (back["provider"], back["asked"], back["used"]) == ("norm", "fragile", "rmsnorm")
    assert "no such chip" in back["reason"]
    failed = [row for row in found if row["kind"] == "failed" and row["step"]]
    assert [row["step"] for row in failed] == [1, 2, 3]
    assert {(row["plugin"], row["hook"]) for row in failed} == {("fails", "on_step_end")}
    assert failed[0]["error"].startswith("ValueError: naïve \x1b[2J \\udcff 雪 https://ann:****")
    assert re.search(r"test_run_events\.py:\d+$", failed[0]["where"])
    assert by_kind["quarantined"]["plugin"] == "fails"
    skipped = [(row["steps"], row["count"], row["total"]) for row in found
               if row["kind"] == "skipped"]  # fmt: skip
    assert skipped == [([2], 1, 1), ([3], 1, 2)]
    assert (by_kind["stopping"]["step"], by_kind["stopping"]["reason"]) == (4, "enough of it")
    assert (by_kind["ended"]["status"], by_kind["ended"]["reason"]) == ("stopped", "enough of it")
    text = (run / "events.jsonl").read_text(encoding="utf-8")
    assert "a-password" not in text and len(text) < 20_000


def test_plateaus_and_failures_end_with_their_reason(tmp_path):
    patience = {"evaluation.eval_freq": 1, "training.early_stopping_patience": 2,
                "training.early_stopping_min_delta": 100.0}  # fmt: skip
    train(tmp_path / "plateau", steps=9, changes=patience)
    *_, stopping, _, end = rows(tmp_path / "plateau")
    assert (stopping["kind"], stopping["step"]) == ("stopping", 3)
    assert stopping["reason"] == end["reason"] == "no better validation loss in 2 evaluations"
    with pytest.raises(Exception, match="--strict"):
        tiny_run(Fails(), steps=4, overrides=QUIET, output=tmp_path / "failed")
    end = rows(tmp_path / "failed")[-1]
    assert (end["kind"], end["status"], end["step"]) == ("ended", "failed", 1)
    assert "plugin fails failed in on_step_end" in end["error"]


def test_plugins_are_enabled_and_disabled_with_epoch_and_step(tmp_path):
    class Curious:
        @hookimpl
        def on_step_end(self, step):
            pass

    schedule = {"schedules.enable_curious_at_step": 3, "schedules.disable_curious_at_step": 5}
    train(tmp_path / "run", Curious(), changes=schedule)
    found = [row for row in rows(tmp_path / "run") if row["kind"] in ("enabled", "disabled")]
    assert [(row["kind"], row["plugin"], row["epoch"], row["step"]) for row in found] == [
        ("enabled", "curious", 1, 3),
        ("disabled", "curious", 1, 5),
    ]
    timeline = json.loads((tmp_path / "run" / "manifest.json").read_text())["timeline"]
    assert [(e["event"], e["step"]) for e in timeline] == [("enabled", 3), ("disabled", 5)]


class FailsInTheSecond:
    @hookimpl
    def on_step_end(self, step, trainer):
        if trainer.rank == 1 and step == 2:
            raise ValueError("only here")


def test_of_two_processes_the_first_one_writes_and_tells_of_the_other(tmp_path, in_children, ranks):
    codes = in_children(*ranks(lambda: train(tmp_path / "run", FailsInTheSecond(), steps=4)))
    assert codes == [0, 0]
    assert told(tmp_path / "run") == [
        ("started", 0), ("failed", 2), ("saved", 4), ("ended", 4),
    ]  # fmt: skip
    start, failed, *_ = rows(tmp_path / "run")
    assert start["processes"] == 2
    assert (failed["process"], failed["plugin"]) == (1, "failsinthesecond")
    assert failed["error"] == "ValueError: only here"


def test_a_full_disk_costs_no_run_and_what_waits_is_written_once_there_is_room(
    tmp_path, monkeypatch
):
    real, full = RowFile._open, []

    def opened(self):
        if self.path.name == "events.jsonl" and full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self)

    class Fills:
        @hookimpl
        def on_step_end(self, step):
            full[:] = [True] if step < 5 else []

    monkeypatch.setattr(RowFile, "_open", opened)
    quiet = train(tmp_path / "quiet", changes=SAVING)
    run = train(tmp_path / "run", Fills(), changes=SAVING)
    assert run.same_weights(quiet)
    assert sorted(told(tmp_path / "run")) == sorted(told(tmp_path / "quiet"))
    assert "events.jsonl: rows wait for room" in (tmp_path / "run" / "log.txt").read_text()


def test_two_runs_in_one_process_write_each_its_own(tmp_path):
    class Inside:
        @hookimpl
        def on_step_end(self, step):
            if step == 2:
                train(tmp_path / "inner", steps=2)

    train(tmp_path / "outer", Inside(), steps=4)
    assert told(tmp_path / "inner") == [("started", 0), ("saved", 2), ("ended", 2)]
    assert told(tmp_path / "outer") == [("started", 0), ("saved", 4), ("ended", 4)]


def test_no_step_writes_an_event(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(run_folder.RunFolder, "write_event", lambda self, row: written.append(row))
    train(tmp_path / "short", steps=4)
    short = len(written)
    train(tmp_path / "long", steps=9)
    assert len(written) == 2 * short
