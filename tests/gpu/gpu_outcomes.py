"""pytest with a file of what became of every test, which is whole after each: of a process that is
killed it says what was tested, and in which test that was.

python tests/gpu/gpu_outcomes.py FILE [pytest's arguments]
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


class Outcomes:
    """Notes each test's outcome, seconds (of its fixtures too) and reason."""

    def __init__(self, path: Path) -> None:
        self.path, self.began = path, time.perf_counter()
        self.running = ""
        self.ended = False
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running = nodeid
        self.write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = self.tests.setdefault(
            report.nodeid, {"test": report.nodeid, "outcome": "passed", "seconds": 0.0}
        )
        row["seconds"] = round(row["seconds"] + report.duration, 3)
        if report.outcome != "passed" and row["outcome"] != "failed":
            row |= {"outcome": report.outcome, "reason": _reason(report)}

    def pytest_runtest_logfinish(self) -> None:
        self.running = ""
        self.write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tests[report.nodeid] = {
                "test": report.nodeid,
                "outcome": "failed",
                "seconds": 0.0,
                "reason": f"cannot be collected: {_reason(report)}",
            }

    def pytest_sessionfinish(self) -> None:
        self.ended = True
        self.write()

    def write(self) -> None:
        tests = list(self.tests.values())
        counts = Counter(row["outcome"] for row in tests)
        content = {
            "ended": self.ended,
            "running": self.running,
            "seconds": round(time.perf_counter() - self.began, 2),
            "counts": {name: counts[name] for name in ("passed", "failed", "skipped")},
            "tests": tests,
        }
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The first line of what a test failed with, or why it was skipped."""
    told = report.longrepr
    if isinstance(told, tuple):  # of a skip: file, line, reason
        return told[2].removeprefix("Skipped: ")
    crash = getattr(told, "reprcrash", None)
    lines = [line.strip() for line in str(told if crash is None else crash.message).splitlines()]
    # Of what cannot be imported the last line that pytest marks is the error.
    marked = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return marked[-1] if crash is None and marked else next(filter(None, lines), "")


def main(arguments: Sequence[str]) -> int:
    path, *rest = arguments
    return int(pytest.main(rest, plugins=[Outcomes(Path(path))]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
