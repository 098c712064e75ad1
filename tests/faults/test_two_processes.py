"""Faults in one of two processes: a few cases are run here, all by ``tox -e faults``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fault_pairs import FEW, KNOWN, PAIRS

pytestmark = pytest.mark.long


@pytest.mark.usefixtures("forked")
def test_both_processes_go_on_or_end_together_when_a_plugin_fails_in_one(tmp_path: Path) -> None:
    """In a process of its own: it forks, which threads of other tests would not survive."""
    command = [sys.executable, str(Path(__file__).parent), "--pairs", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(FEW)} cases in two processes" in done.stdout


def test_cases_in_two_processes_have_names_of_their_own() -> None:
    names = [f"{case} {case.call}" for case in PAIRS]
    assert len(set(names)) == len(names)
    assert {str(case) for case in PAIRS} >= KNOWN.keys()
    assert {case.end for case in FEW} == {case.end for case in PAIRS}
    assert {case.policy for case in FEW} >= {"isolate", "required"}
