"""Write docs/performance.md from benchmarks/results/*.json; with --check, only compare."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Standard library only: the page is checked where neither APT nor its dependencies are installed.
ROOT = Path(__file__).resolve().parent.parent

HEAD = """\
# Performance

Each section answers one question with `benchmarks/<name>.py`. Sides are timed in turns in one run;
a ratio is one of medians, its interval covers 95% of bootstrap resamples of the rounds.
Figures that compare a peer with itself (A/A) show what the machine's noise alone does.

This page is rendered from `benchmarks/results/` by `python benchmarks/render.py`.
"""


def render(results: Path) -> str:
    """The whole page, one section a result, in the order of file names."""
    sections = [_section(path) for path in sorted(results.glob("*.json"))]
    return "\n".join([HEAD, *sections])


def _section(path: Path) -> str:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    spread = result["raw"].get("spread", {})
    rows = [
        f"| `{name}` | {figure(value)} | {interval(spread.get(name))} |"
        for name, value in result["figures"].items()
    ]
    return "\n".join(
        [
            f"## {result['question']}",
            "",
            f"`benchmarks/{path.stem}.py`",
            "",
            "| figure | value | 95% interval |",
            "|---|---:|---:|",
            *rows,
            "",
            f"Machine: {facts(result['machine'])}.",
            f"Versions: {facts(result['versions'])}.",
            "",
        ]
    )


def figure(value: float) -> str:
    """A number as people read it: whole and large ones without decimals, others to four digits.

    >>> figure(1.23456), figure(12345.6), figure(3)
    ('1.235', '12,346', '3')
    """
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def interval(low_high: Sequence[float] | None) -> str:
    """The two ends of an interval, or nothing where there is none."""
    return " – ".join(figure(bound) for bound in low_high) if low_high else ""


def facts(mapping: Mapping[str, Any]) -> str:
    """Names and values in one line."""
    return ", ".join(f"{name} {value}" for name, value in mapping.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; 1 when ``--check`` finds it out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    options = parser.parse_args(argv)
    page = render(options.results)
    if not options.check:
        options.page.write_text(page, encoding="utf-8")
        return 0
    if options.page.exists() and options.page.read_text(encoding="utf-8") == page:
        return 0
    print(f"{options.page} is out of date: run python benchmarks/render.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
