"""The command that runs all that is to be done on a GPU, where there is none."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent

TESTS = {
    "test_some.py": """
import pytest

@pytest.fixture
def broken():
    raise OSError("no such part")

def test_good(): pass
def test_bad(): assert 1 + 1 == 3
def test_broken(broken): pass
@pytest.mark.skip(reason="needs two GPUs")
def test_skipped(): pass
""",
    "test_unread.py": "import not_there",
    "test_killed.py": "import os, signal\ndef test_dies(): os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.fixture(scope="module")
def command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_command", HERE / "__main__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcomes(folder: Path, *names: str) -> tuple[int, dict[str, Any]]:
    """What pytest makes of the TESTS called ``names``, and its exit code."""
    found = folder / "found.json"
    for name in names:
        (folder / name).write_text(TESTS[name])
    ended = subprocess.run(
        [sys.executable, HERE / "gpu_outcomes.py", found, "-p", "no:cacheprovider", *names],
        cwd=folder,
        capture_output=True,
        check=False,
    )
    return ended.returncode, json.loads(found.read_text())


def test_every_outcome_is_kept_with_its_reason(command: ModuleType, tmp_path: Path) -> None:
    code, found = outcomes(tmp_path, "test_unread.py")
    assert code != 0 and [row["reason"] for row in found["tests"]] == [
        "cannot be collected: ModuleNotFoundError: No module named 'not_there'"
    ]
    code, found = outcomes(tmp_path, "test_some.py")
    told = {row["test"].partition("::")[2]: row for row in found["tests"]}
    assert {name: row["outcome"] for name, row in told.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_broken": "failed",
        "test_skipped": "skipped",
    }
    assert told["test_bad"]["reason"] == "assert (1 + 1) == 3"
    assert told["test_broken"]["reason"] == "OSError: no such part"
    passed, lines = command.judge_tests(code, found)
    assert not passed
    assert lines[0].startswith("tests: 1 passed, 2 failed, 1 skipped in ")
    assert "  skipped 1: needs two GPUs" in lines
    assert "  failed  test_some.py::test_broken: OSError: no such part" in lines


def test_of_tests_that_were_killed_the_last_one_is_named(
    command: ModuleType, tmp_path: Path
) -> None:
    code, found = outcomes(tmp_path, "test_killed.py")
    passed, lines = command.judge_tests(code, found)
    assert not passed and lines[-1] == "  did not end; was in test_killed.py::test_dies"
    passed, lines = command.judge_tests(5, {"ended": True, "counts": {}, "tests": []})
    assert not passed and lines[-1] == "  pytest ended with exit code 5"
    passed, lines = command.judge_tests(None, {})
    assert not passed and lines[-1] == "  did not end; was in none of them"


def test_rows_without_a_figure_and_goals_are_told(command: ModuleType) -> None:
    rows = [
        {"row": "eager", "outcome": "measured", "reason": "", "seconds": 9},
        {"row": "compiled", "outcome": "failed", "reason": "no C compiler", "seconds": 1},
        {"row": "gqa", "outcome": "left out", "reason": "9 s are left", "seconds": 0},
        {"row": "tva", "outcome": "not ended", "reason": "", "seconds": 0},
    ]
    goals = [
        {"goal": "tokens/s", "wanted": 1.1, "measured": 1.234, "met": True, "by": "apt"},
        {"goal": "share", "wanted": 0.5, "measured": 0.4, "met": False, "by": "apt"},
        {"goal": "another", "wanted": 0.5, "measured": None, "met": None},
    ]
    passed, lines = command.judge_benchmark(1, {"raw": {"rows": rows, "goals": goals}})
    assert not passed
    assert lines == [
        "benchmark: 1 measured, 1 failed, 1 left out, 1 not ended in 10 s",
        "  failed: compiled (no C compiler)",
        "  left out: gqa (9 s are left)",
        "  not ended: tva",
        "  goal: tokens/s, on an H100 1.1: 1.23 by apt, met",
        "  goal: share, on an H100 0.5: 0.4 by apt, NOT met",
        "  goal: another, on an H100 0.5: not measured",
    ]
    passed, lines = command.judge_benchmark(None, {})
    assert not passed and lines == [
        "benchmark: nothing measured in 0 s",
        "  did not end in its time",
    ]


@pytest.mark.parametrize(
    ("cuda", "error", "said"),
    [
        (None, "Torch not compiled with CUDA enabled", "is a build without CUDA"),
        ("13.0", "The NVIDIA driver on your system is too old", "driver on your system is too old"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_an_error(
    command: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    cuda: str | None,
    error: str,
    said: str,
) -> None:
    found = {"torch": "2.13.0", "cuda": cuda, "gpus": [], "error": error}
    monkeypatch.setattr(command, "look", lambda: found)
    monkeypatch.setattr(command, "has_nvidia_gpu", lambda: True)
    assert command.main(["--results", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert said in shown and "tox run -r -e gpu" in shown and not list(tmp_path.iterdir())


def test_what_a_part_has_started_ends_with_it(command: ModuleType, tmp_path: Path) -> None:
    started = tmp_path / "started"
    leaves = ["sh", "-c", f"sleep 100 & echo $! > {started}; exit 3"]
    assert command.run(leaves, 100.0, hide=True) == 3
    status = Path(f"/proc/{started.read_text().strip()}/status")
    while status.exists() and "zombie" not in status.read_text():
        time.sleep(
            0.01
        )  # a signal takes a moment; of one that never comes the test's timeout tells
    assert command.run(["sleep", "100"], 0.05, hide=True) is None
