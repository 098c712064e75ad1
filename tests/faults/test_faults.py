"""The fault matrix: a small part of it is run here, the whole by ``tox -e faults``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fault_kinds
import fault_matrix
import fault_runs
import pytest
import torch
from fault_matrix import FORMS, HOOKS, ONE_OF, POLICIES, cases_of, few, positions

MATRIX = Path(__file__).resolve().parent


@pytest.mark.usefixtures("forked")
def test_a_small_part_of_the_matrix_is_as_expected(tmp_path: Path) -> None:
    """In a process of its own: it forks, which threads of other tests would not survive. A hook
    that is called in none of the scenes ends it."""
    result = tmp_path / "faults.json"
    command = [sys.executable, str(MATRIX), "--quick", "--jobs", "1", "--json", str(result)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(result.read_text(encoding="utf-8"))
    assert told["hooks"].keys() == HOOKS.keys()
    assert sum(row["tried"] for row in told["rows"]) == told["cases"] >= len(HOOKS)


def test_a_case_that_is_not_as_expected_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APT_CACHE", str(tmp_path))
    threads = torch.get_num_threads()
    laboratory = fault_runs.Laboratory(tmp_path)
    monkeypatch.setattr(fault_runs, "expected_of", lambda *_: fault_matrix.INTERRUPTED)
    case = fault_matrix.Case("on_step_end", "raise-ValueError", "isolate", "middle")
    verdict = laboratory.run(case)
    torch.set_num_threads(threads)
    assert verdict.outcome == "not as expected: exit 0, finished"
    assert "exit code 0, expected 130 (interrupted, saved)" in verdict.wrong


PLACES = {"start": 1, "first": 2, "middle": 5, "checkpoint": 6, "end": 8}


def test_every_hook_has_cases_of_every_kind_and_the_small_part_has_each_somewhere() -> None:
    cases = [case for hook in HOOKS for case in cases_of(hook, PLACES)]
    assert len({str(case) for case in cases}) == len(cases)
    for hook in HOOKS:
        own = {case.kind for case in cases if case.hook == hook}
        assert own >= fault_kinds.kinds_of(hook).keys()
    chosen = few(cases)
    assert {case.hook for case in chosen} == HOOKS.keys()
    kinds = {case.kind for case in chosen}
    for every in (fault_kinds.RAISING, fault_kinds.STATE):
        assert len(kinds & every.keys()) >= len(every) / ONE_OF
    assert {case.policy for case in chosen} == set(POLICIES)
    assert {case.form for case in chosen} > set(FORMS)
    assert {case.position for case in chosen} == {*PLACES, "always"}


def test_every_parameter_of_a_hook_is_changed_or_known_not_to_be() -> None:
    given = {name for hook in HOOKS for name in fault_runs.parameters_of(hook)}
    assert given == fault_kinds.MUTATIONS.keys()


def test_a_hook_is_tried_where_it_is_called() -> None:
    calls = [(None, None), (0, 0), (0, 1), (4, 5), (5, 6), (7, 8)]
    assert positions(calls, 6) == {"start": 1, "first": 3, "middle": 4, "checkpoint": 5, "end": 6}
    assert positions([(None, None)], 6) == {"start": 1}
    assert positions([], 6) == {}
