"""The benchmarks' harness and the page of figures; the figures themselves are no tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"

SLEEPS = """
from time import sleep

from _harness import Report, Series, interleave, run


def measure(report: Report, quick: bool) -> None:
    sides = {"long": lambda: sleep(0.004), "short": lambda: sleep(0.001)}
    times = interleave(sides, baseline="short", rounds=3, calls=1)
    report.ratio("long_over_short", times, "long", over="short")
    report.noise("short_over_short", times)
    report.table("What they are", ["side", "seconds"], [["long", 0.004], ["short", 0.001]])
    line = Series("asked", [1, 2], [0.004, 0.001], [0.003, 0.001], [0.005, 0.002])
    report.plot("asked", "Asked for", x_label="side", y_label="seconds", series=[line])
    report.note("One sleeps four times as long.")


if __name__ == "__main__":
    run("How long is a sleep?", measure, packages=["pluggy"])
"""

Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def python(tmp_path: Path) -> Python:
    """Runs a script of the benchmarks, and asserts how it ends."""

    def call(script: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            [sys.executable, script, *map(str, arguments)],
            env={"PYTHONPATH": f"{BENCHMARKS}:{ROOT}", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == code, ended.stderr
        return ended

    return call


def test_a_result_becomes_a_page_that_goes_out_of_date_with_it(
    python: Python, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the plots")
    script, result = tmp_path / "sleeps.py", tmp_path / "results" / "sleeps.json"
    script.write_text(SLEEPS)
    printed = python(script, "--quick", "--json", result).stdout
    assert "How long is a sleep?" in printed and "long_over_short" in printed
    content = json.loads(result.read_text())
    assert content["figures"]["long_over_short"] > 1

    page, figure = tmp_path / "page.md", tmp_path / "figures" / "sleeps-asked.svg"
    where = ("--results", result.parent, "--page", page)
    missing = python(BENCHMARKS / "render.py", "--check", *where, code=1).stderr
    assert str(page) in missing and str(figure) in missing
    python(BENCHMARKS / "render.py", *where)
    text = page.read_text()
    for shown in (
        "| `long_over_short` |",
        "| long | 0.004 |",
        "![Asked for](figures/sleeps-asked.svg)",
        "One sleeps four times as long.",
    ):
        assert shown in text
    python(BENCHMARKS / "render.py", "--check", *where)

    content["raw"]["plots"][0]["series"][0]["y"][0] = 0.0041
    result.write_text(json.dumps(content))
    assert str(figure) in python(BENCHMARKS / "render.py", "--check", *where, code=1).stderr


def test_what_does_not_fit_together_is_refused() -> None:
    sides = (
        "from _harness import Report, Series, interleave\n"
        "report = Report('?', {}, {})\n"
        "for wrong in (lambda: Series('a', [1], [1, 2]),\n"
        "              lambda: report.table('t', ['a', 'b'], [['one']]),\n"
        "              lambda: interleave({'a': int}, baseline='b', rounds=1)):\n"
        "    try:\n"
        "        wrong()\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", sides], cwd=BENCHMARKS, capture_output=True, text=True, check=True
    )
    assert len(ended.stdout.splitlines()) == 3
