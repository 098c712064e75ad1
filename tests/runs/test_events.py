"""Events of a run: what is written, and what is read of it."""

from __future__ import annotations

import ast
import json
import logging
from pathlib import Path

import pytest

from apt_core.event_log import MAX_WAITING, EventLog
from apt_core.runs.events import KINDS, MAX_ITEMS, MAX_TEXT, as_row, read_events
from apt_core.secrets import SecretValues

ROOT = Path(__file__).parents[2]
SCHEDULED = ("enabled", "disabled")
log = logging.getLogger("apt.training")


@pytest.fixture
def history(tmp_path):
    def read(*events):
        lines = [json.dumps({"step": step, "kind": kind}) + "\n" for step, kind in events]
        (tmp_path / "events.jsonl").write_text("".join(lines), encoding="utf-8")
        return read_events(tmp_path)

    return read


def shown(events):
    return [(event.step, event.kind) for event in events]


def test_one_call_makes_the_line_and_the_row(caplog):
    events, kept = EventLog(), []
    with caplog.at_level("INFO"):
        events.record("saved", "checkpoint: c", step=3, log=log, checkpoint="c")
        with events.kept_with(kept.append):
            events.record("deleted", "deleted b: 100%", step=4, log=log, level=logging.DEBUG)
    assert caplog.messages == ["checkpoint: c"]
    assert [{**row, "time": row["time"][-1]} for row in kept] == [
        {"time": "Z", "step": 3, "kind": "saved", "message": "checkpoint: c", "checkpoint": "c"},
        {"time": "Z", "step": 4, "kind": "deleted", "message": "deleted b: 100%"},
    ]


def test_a_run_without_a_folder_keeps_no_more_than_some_events():
    events, kept = EventLog(), []
    for step in range(MAX_WAITING + 5):
        events.record("saved", "checkpoint", step=step, log=log, level=logging.DEBUG)
    with events.kept_with(kept.append):
        pass
    assert len(kept) == MAX_WAITING


def test_a_row_is_of_bounded_size_and_has_no_secrets():
    secrets = SecretValues()
    secrets.add(["hunter2-hunter2"])

    class Odd:
        def __str__(self):
            raise ValueError

    deep = []
    for _ in range(50):
        deep = [deep]
    row = as_row(
        {
            "step": 1,
            "kind": "failed",
            "message": "x" * 10**6,
            "error": "no entry with hunter2-hunter2 at https://ann:secret-word@host",
            "api_key": "abcdefgh",
            "steps": list(range(10**5)),
            "names": {str(n): "hunter2-hunter2" for n in range(10**4)},
            "odd": Odd(),
            "deep": deep,
        }
    )
    text = json.dumps(row)
    assert len(row["message"]) == MAX_TEXT + 1
    assert len(row["steps"]) == len(row["names"]) == MAX_ITEMS
    assert not any(word in text for word in ("hunter2", "secret-word", "abcdefgh"))
    assert len(text) < 20_000


def test_what_came_after_the_step_of_a_resume_is_lost(history):
    found = history(
        (0, "started"),
        (2, "enabled"),
        (6, "enabled"),
        (7, "failed"),
        (4, "resumed"),
        (5, "enabled"),
        (6, "ended"),
        (4, "rewound"),
        (4, "resumed"),
        (6, "a later version's"),
    )
    assert shown(found.events) == [
        (0, "started"), (2, "enabled"), (4, "resumed"), (4, "rewound"), (4, "resumed"),
        (6, "a later version's"),
    ]  # fmt: skip
    assert shown(found.lost) == [(6, "enabled"), (7, "failed"), (5, "enabled"), (6, "ended")]


def test_a_run_that_starts_anew_has_no_past(history):
    assert shown(history((0, "started"), (0, "failed"), (0, "started")).events) == [(0, "started")]


def test_fields_of_other_types_are_data_of_no_meaning(tmp_path):
    row = {"step": 1, "kind": ["x"], "plugin": 7, "message": None, "time": {}, "epoch": "1"}
    (tmp_path / "events.jsonl").write_text(json.dumps(row) + "\n")
    (event,) = read_events(tmp_path).events
    assert (event.kind, event.plugin, event.message, event.time) == ("", "", "", "")
    assert event.data == {"epoch": "1"}


def test_the_docs_list_each_kind_as_the_table_has_it():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    section = text.partition("| kind | what happened |\n|---|---|\n")[2].partition("\n\n")[0]
    assert section.splitlines() == [f"| `{kind}` | {says} |" for kind, says in KINDS.items()]


def test_only_listed_kinds_are_recorded_and_all_of_them_are():
    recorded = set()
    for path in ROOT.glob("apt_core/**/*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("events.record"):
                kind = call.args[0]
                # Those of the schedule and of the trainable set are variables.
                several = {*SCHEDULED, "frozen", "thawed"}
                recorded |= {kind.value} if isinstance(kind, ast.Constant) else several
    assert recorded == set(KINDS)
