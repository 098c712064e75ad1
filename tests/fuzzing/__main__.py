"""Fuzzing: inputs made from a seed, of which only declared errors may come.

python tests/fuzzing                        # 100,000 inputs, on all cores
python tests/fuzzing --quick                # the few that are in the tests
python tests/fuzzing --target profile-text --count 5000 --seed 7
python tests/fuzzing --target plugins --seed 0 --only 1234     # one input, shown, with its error
"""

from __future__ import annotations

import argparse
import json
import os
import pprint
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads would not survive a fork

from fuzz_runs import Finding, Tally, fuzz, seconds_since, source_of
from fuzz_targets import TARGETS, Target

COUNT = 100_000
QUICK = 1_000

FEWEST = 15
"""Inputs of each target, however few there are."""


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python tests/fuzzing", None, __doc__, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="the few that are in the tests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=None, help="inputs, of all targets together")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="repeatable")
    parser.add_argument("--only", type=int, metavar="N", help="show one input and its end")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what came of it there")
    options = parser.parse_args(arguments)
    names = options.target or list(TARGETS)
    count = options.count or (QUICK if options.quick else COUNT)
    began = time.perf_counter()
    root = Path(tempfile.mkdtemp(prefix="apt-fuzz-")).resolve()
    try:
        targets = [TARGETS[name](root / "kept") for name in names]
        if options.only is not None:
            return show(targets[0], options.seed, options.only, root)
        tallies = {
            target.name: told(target, number, options, root)
            for target, number in zip(targets, numbers_of(targets, count), strict=True)
        }
    finally:
        shutil.rmtree(root, ignore_errors=True)
    seconds = seconds_since(began)
    tried = sum(tally.tried for tally in tallies.values())
    found = [finding for tally in tallies.values() for finding in tally.findings]
    print(f"{tried:,} inputs in {seconds:.0f} s, {len(found)} with an unexpected end")
    if options.json:
        words = sys.argv[1:] if arguments is None else arguments
        write(options.json, tallies, seconds, options.seed, words)
    return 1 if found else 0


def numbers_of(targets: Sequence[Target], count: int) -> list[int]:
    """How many inputs each target gets."""
    shares = sum(target.share for target in targets)
    return [max(FEWEST, -(-count * target.share // shares)) for target in targets]


def told(target: Target, count: int, options: argparse.Namespace, root: Path) -> Tally:
    """Fuzz one target, and print what came of it, the first finding of each place in full."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    seen: set[str] = set()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(target.name, total=count)

        def tell(finding: Finding | None) -> None:
            progress.advance(task)
            if finding is not None and finding.where not in seen:
                seen.add(finding.where)
                again = ["python", "tests/fuzzing", "--target", target.name, "--seed",
                         str(options.seed), "--only", str(finding.number)]  # fmt: skip
                text = f"{target.name} {finding.number}: {finding.error} ({finding.where})"
                text += f"\n  again: {shlex.join(again)}"
                progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

        began = time.perf_counter()
        tally = fuzz(target, options.seed, range(count), root, jobs=options.jobs, tell=tell)
    outcomes = ", ".join(f"{number} {word}" for word, number in tally.outcomes.most_common())
    rate = tally.tried / max(time.perf_counter() - began, 1e-9)
    print(f"{target.name}: {tally.tried:,} tried, {rate:.0f} a second ({outcomes})", flush=True)
    return tally


def show(target: Target, seed: int, number: int, root: Path) -> int:
    """Print one input, and what comes of it."""
    given = target.make(source_of(seed, target.name, number))
    pprint.pprint(given, width=100)
    tally = fuzz(target, seed, [number], root)
    print(dict(tally.outcomes))
    for finding in tally.findings:
        print(finding.details or finding.error)
    return 1 if tally.findings else 0


def write(
    path: Path, tallies: dict[str, Tally], seconds: float, seed: int, words: Sequence[str]
) -> None:
    sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from _harness import command_of

    content: dict[str, Any] = {
        "tool": "fuzz",
        "command": command_of("tests/fuzzing", words),
        "seed": seed,
        "seconds": seconds,
        "rows": [
            {
                "kind": name,
                "tried": tally.tried,
                "outcomes": dict(tally.outcomes.most_common()),
                "unexpected": len(tally.findings),
            }
            for name, tally in tallies.items()
        ],
        "inputs": sum(tally.tried for tally in tallies.values()),
        "unexpected": {
            name: dict(Counter(f"{f.error[:100]} ({f.where})" for f in tally.findings))
            for name, tally in tallies.items()
            if tally.findings
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
