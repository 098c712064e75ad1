"""Write docs/performance.md, docs/figures/ and the tables of docs/reliability.md from
benchmarks/results/*.json. --check only compares."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Standard library only, except for drawing: --check runs without APT and its dependencies.
ROOT = Path(__file__).resolve().parent.parent
DRAWING = Path(__file__).with_name("plots.py")

HEAD = """\
# Performance

Each section answers one question with `benchmarks/<name>.py`. Unless a section says otherwise, its
sides are timed in turns in one run, a ratio is that of medians, and an interval covers 95% of
bootstrap resamples of the rounds. Figures that compare a side with itself (A/A), such as
`mha_over_mha`, show the noise of the machine.

`python benchmarks/render.py` renders this page from `benchmarks/results/`.
"""

ON_A_GPU = """\
## On a GPU

    tox -e gpu

This command works in a fresh clone on a machine with an NVIDIA GPU. It makes an environment, and in
less than ten minutes runs the tests that compute on a GPU and `benchmarks/gpu.py`. It writes their
JSON to `gpu-results/` and prints a summary: what passed, failed or was skipped and why, and the
figures beside the goals. `python tests/gpu` does the same in an existing environment.

The machine needs tox, a C compiler (for `torch.compile`) and a driver for CUDA 13, for which
torch's package on PyPI is built. For an older driver, name an index of builds for its CUDA:
`PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cu126`. If torch cannot use the GPU, the
command fails and says so.

The benchmark runs APT beside a bare loop like nanoGPT's and measures

- training of GPT-2 with 124 million parameters, in batches of 12 sequences of 1,024 tokens: eager,
  compiled, with CUDA graphs and as a profile has it by default, with each change of precision,
  optimizer, vocabulary and attention;
- the shipped profile `base`, and a model of one layer, whose time goes into launches;
- layers of 8, 32 and 64 experts beside a dense layer of as many operations;
- the time for which a checkpoint holds up training;
- tokens decoded per second.

For each side it reports tokens per second, GiB and launches per step, and the share of two peaks:
the one measured on the device and the one that NVIDIA states. The goals are 1.1 times the tokens
per second of the fastest bare loop, and half of an H100's bf16 peak. The report names the rows that
`--budget` left no time for; a row that fails does not end the others.

Without a GPU the same command skips every test and runs every row at a small size: its files
say `"dry_run": true`, and their figures mean nothing.
"""

NO_FIGURES = "No figures of a GPU are kept: neither tests nor benchmark have run on one yet.\n"

TOOLS = {
    "faults": "The fault matrix",
    "chaos": "Chaos",
    "soak": "Soak",
    "fuzz": "Fuzzing",
}
"""Tools that look for faults instead of measuring: their titles by the name of their result."""

BEGIN, END = "<!-- rendered: begin -->", "<!-- rendered: end -->"
"""The lines of docs/reliability.md that enclose its tables."""


def render(results: Path) -> str:
    """The whole page on performance, with one section per result, in the order of file names."""
    sections = [_section(path.stem, _read(path)) for path in _measured(results)]
    kept = (results / "gpu.json").exists()
    return "\n".join([HEAD, *sections, ON_A_GPU, *([] if kept else [NO_FIGURES])])


def render_reliability(results: Path, page: str) -> str:
    """``page`` with new tables of faults. Raises ValueError without the lines that enclose them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"it has no lines {BEGIN} and {END}")
    found = {name: results / f"{name}.json" for name in TOOLS}
    sections = [_found(TOOLS[name], _read(path)) for name, path in found.items() if path.exists()]
    return "\n".join([f"{before}{BEGIN}\n", *sections, f"{END}{after}"])


def missing(results: Path) -> list[Path]:
    """The files that the page on reliability needs and ``results`` does not have."""
    return [path for name in TOOLS if not (path := results / f"{name}.json").exists()]


def _measured(results: Path) -> list[Path]:
    return [path for path in sorted(results.glob("*.json")) if path.stem not in TOOLS]


def _found(title: str, result: Mapping[str, Any]) -> str:
    """The section of one tool: what it tried, what survived and what did not."""
    rows = result["rows"]
    tried, unexpected = (sum(row[key] for row in rows) for key in ("tried", "unexpected"))
    seconds = f"{result['seconds']:,.0f} s"
    if all("growth" in row for row in rows):
        steps, plugins = result["steps"], len(result["plugins"])
        summary = f"{steps:,} steps with {plugins} plugins in {seconds}; {unexpected} not flat."
        table = _table(
            ["kept flat", "first tenth", "last tenth", "growth", "interval", "verdict"],
            [
                [
                    row["kind"],
                    *(row[key] for key in ("first", "last", "growth")),
                    interval(row["interval"]),
                    next(iter(row["outcomes"])),
                ]
                for row in rows
            ],
        )
    else:
        summary = f"{tried:,} tried in {seconds}, {unexpected:,} not as expected."
        table = _table(
            ["kind of fault", "tried", "survived", "found", "outcomes"],
            [
                [
                    row["kind"],
                    row["tried"],
                    row["tried"] - row["unexpected"],
                    row["unexpected"],
                    ", ".join(f"{count:,} {name}" for name, count in row["outcomes"].items()),
                ]
                for row in rows
            ],
        )
    parts = [
        f"### {title}",
        summary,
        table,
        f"Again: `{result['command']}`, seed {result['seed']}.",
    ]
    if result.get("left_out"):
        parts.append(f"Left out: {result['left_out']}.")
    return "\n\n".join(parts) + "\n"


def plots(results: Path) -> dict[str, dict[str, Any]]:
    """The plots of all results by file name."""
    return {
        _file_name(path.stem, plot): plot
        for path in _measured(results)
        for plot in _read(path)["raw"].get("plots", [])
    }


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def _file_name(benchmark: str, plot: Mapping[str, Any]) -> str:
    return f"{benchmark}-{plot['name']}.svg"


def _section(benchmark: str, result: Mapping[str, Any]) -> str:
    raw = result["raw"]
    spread = raw.get("spread", {})
    figures = [
        [f"`{name}`", figure(value), interval(spread.get(name))]
        for name, value in result["figures"].items()
    ]
    parts = [
        f"## {result['question']}",
        f"`benchmarks/{benchmark}.py`",
        _table(["figure", "value", "interval"], figures),
        *raw.get("notes", []),
        *(
            f"![{plot['title']}](figures/{_file_name(benchmark, plot)})"
            for plot in raw.get("plots", [])
        ),
        *(
            f"**{table['title']}**\n\n{_table(table['columns'], table['rows'])}"
            for table in raw.get("tables", [])
        ),
        f"Machine: {facts(result['machine'])}.\nVersions: {facts(result['versions'])}.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table with the first column aligned left, the others right."""
    lines = [columns, *([cell(value) for value in row] for row in rows)]
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---|" + "---:|" * (len(columns) - 1), *body])


def cell(value: str | float) -> str:
    """A cell of a table: text as it is, numbers as figures."""
    return value if isinstance(value, str) else figure(value)


def _digest(plot: Mapping[str, Any]) -> str:
    """The digest of a plot's data and of the code that draws it."""
    data = json.dumps(plot, sort_keys=True).encode()
    return f"sha256:{hashlib.sha256(DRAWING.read_bytes() + data).hexdigest()}"


def _is_current(path: Path, plot: Mapping[str, Any]) -> bool:
    return path.exists() and _digest(plot) in path.read_text(encoding="utf-8")


def figure(value: float) -> str:
    """A number for readers: integers and large ones without decimals, others in four digits.

    >>> figure(1.23456), figure(12345.6), figure(3)
    ('1.235', '12,346', '3')
    """
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def interval(low_high: Sequence[float] | None) -> str:
    """Both ends of an interval; empty where there is none."""
    return " – ".join(figure(bound) for bound in low_high) if low_high else ""


def facts(mapping: Mapping[str, Any]) -> str:
    """Names and values in one line."""
    return ", ".join(f"{name} {value}" for name, value in mapping.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page and its figures; 1 when ``--check`` finds something out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--reliability", type=Path, default=ROOT / "docs" / "reliability.md")
    options = parser.parse_args(argv)
    for path in missing(options.results) if options.check else ():
        print(f"{path} is missing: the page on reliability has no table of it", file=sys.stderr)
    page = render(options.results)
    folder = options.page.parent / "figures"
    figures = {folder / name: plot for name, plot in plots(options.results).items()}
    old = [path for path, plot in figures.items() if not _is_current(path, plot)]
    before = options.reliability.read_text(encoding="utf-8")
    try:
        reliability = render_reliability(options.results, before)
    except ValueError as error:
        parser.error(f"{options.reliability}: {error}")
    if not options.check:
        options.page.write_text(page, encoding="utf-8")
        options.reliability.write_text(reliability, encoding="utf-8")
        _draw({path: figures[path] for path in old})
        return 0
    if not options.page.exists() or options.page.read_text(encoding="utf-8") != page:
        old.append(options.page)
    if before != reliability:
        old.append(options.reliability)
    for path in old:
        print(f"{path} is out of date: run python benchmarks/render.py", file=sys.stderr)
    return 1 if old or missing(options.results) else 0


def _draw(figures: Mapping[Path, Mapping[str, Any]]) -> None:
    if not figures:
        return
    from plots import draw  # matplotlib is needed only where something is drawn

    for path, plot in figures.items():
        draw(plot, path, _digest(plot))


if __name__ == "__main__":
    sys.exit(main())
