"""The fault matrix: every hook, every kind of fault, every policy, in forked children.

python tests/faults                     # all cases, on all cores
python tests/faults --quick             # the small part that is in the tests
python tests/faults --only on_step_end/raise-SystemExit/isolate/middle
python tests/faults --hook on_metrics --kind state --json FILE
python tests/faults --pairs [--quick]   # faults in one of two processes
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
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

from fault_matrix import HOOKS, Case, few
from fault_pairs import FEW, KNOWN, PAIRS, Pair, run_pairs
from fault_runs import Laboratory, Verdict, run_all
from rich.console import Console

from apt_core.runs.folder import versions

GROUPS = {
    "raise": "raising",
    "return": "returning what the hook does not accept",
    "later": "handing over what fails when it is called",
    "mutate": "changing what it was handed",
    "state": "changing global state",
    "hang": "hanging in the background",
    "wrong": "a wrapper that does not yield, or twice",
}
"""By the beginning of a kind's name, what is tried."""


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python tests/faults", None, __doc__, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="the small part")
    parser.add_argument("--sample", type=int, metavar="N", help="so many of the cases, by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], metavar="CASE", help="repeatable")
    parser.add_argument("--hook", action="append", default=[], metavar="NAME", help="repeatable")
    parser.add_argument("--kind", default="", metavar="REGEX", help="kinds whose name it matches")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what came of it there")
    parser.add_argument("--list", action="store_true", help="show the cases and run none")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the runs' folders there")
    parser.add_argument("--pairs", action="store_true", help="faults in one of two processes")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    began = time.perf_counter()
    if options.keep is not None and options.keep.exists():
        parser.error(f"--keep: {options.keep} is there already")
    root = options.keep or Path(tempfile.mkdtemp(prefix="apt-faults-"))
    try:
        if options.pairs:
            return in_pairs(root.resolve(), options)
        laboratory = Laboratory(root.resolve())
        cases = chosen(laboratory, options, console)
        if options.list:
            print(*cases, sep="\n")
            return 0
        verdicts = shown(laboratory, cases, options, console)
    finally:
        if options.keep is None:
            shutil.rmtree(root, ignore_errors=True)
    seconds = time.perf_counter() - began
    unexpected = [verdict for verdict in verdicts if verdict.wrong]
    for kind, tried, outcomes, wrong in table(verdicts):
        told = ", ".join(f"{count} {name}" for name, count in outcomes.items())
        print(f"{kind}: {tried} tried, {wrong} unexpected ({told})")
    print(f"{len(verdicts)} cases of {len(HOOKS)} hooks in {seconds:.0f} s, "
          f"{len(unexpected)} not as expected")  # fmt: skip
    if options.json:
        words = sys.argv[1:] if arguments is None else arguments
        write(options.json, verdicts, seconds, words, options.seed)
    return 1 if unexpected else 0


def in_pairs(root: Path, options: argparse.Namespace) -> int:
    """Faults in one of two processes: each case with its seconds, and what is not as expected."""

    def tell(case: Pair, wrong: list[str], seconds: float) -> None:
        print(f"{seconds:5.1f} s  {case}", *(f"  {line}" for line in wrong), sep="\n", flush=True)
        if wrong:
            again = shlex.join(["python", "tests/faults", "--pairs", "--only", str(case)])
            print(f"  again: {again}", flush=True)

    cases = FEW if options.quick else PAIRS
    if options.only:
        cases = [case for case in PAIRS if str(case) in options.only]
    began = time.perf_counter()
    unexpected = run_pairs(root, cases, tell, keep=options.keep is not None)
    seconds = time.perf_counter() - began
    known = sum(str(case) in KNOWN for case in cases)
    print(
        f"{len(cases)} cases in two processes in {seconds:.0f} s, {unexpected} not as expected, "
        f"and {known} known not to be"
    )
    return 1 if unexpected or not cases else 0


def chosen(laboratory: Laboratory, options: argparse.Namespace, console: Console) -> list[Case]:
    hooks = options.hook or list(dict.fromkeys(name.partition("/")[0] for name in options.only))
    cases = [case for hook in hooks or HOOKS for case in laboratory.cases_of(hook)]
    if options.only:
        names = {str(case): case for case in cases}
        unknown = [name for name in options.only if name not in names]
        if unknown:
            raise SystemExit(f"there is no case {unknown[0]}: see --list")
        return [names[name] for name in options.only]
    cases = [case for case in cases if re.search(options.kind, case.kind)]
    if options.sample is not None:
        return random.Random(options.seed).sample(cases, min(options.sample, len(cases)))
    return few(cases) if options.quick else cases


def shown(
    laboratory: Laboratory, cases: Sequence[Case], options: argparse.Namespace, console: Console
) -> list[Verdict]:
    """Run the cases, and show how far that is and what is not as expected."""
    from rich.progress import Progress

    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("cases", total=len(cases))

        def tell(verdict: Verdict) -> None:
            progress.advance(task)
            if verdict.wrong:
                lines = [f"{verdict.case}: {verdict.outcome}", *(f"  {w}" for w in verdict.wrong)]
                again = shlex.join(["python", "tests/faults", "--only", str(verdict.case)])
                text = "\n".join([*lines, f"  again: {again}"])
                progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

        return run_all(laboratory, cases, options.jobs, tell, keep=options.keep is not None)


def table(verdicts: Sequence[Verdict]) -> list[tuple[str, int, dict[str, int], int]]:
    """By what was tried: how many cases, what came of them, and how many were unexpected."""
    rows = []
    for prefix, kind in GROUPS.items():
        own = [v for v in verdicts if v.case.kind.partition("-")[0] == prefix]
        if own:
            outcomes = Counter(verdict.outcome for verdict in own)
            wrong = sum(bool(verdict.wrong) for verdict in own)
            rows.append((kind, len(own), dict(outcomes.most_common()), wrong))
    return rows


def write(
    path: Path, verdicts: Sequence[Verdict], seconds: float, words: Sequence[str], seed: int
) -> None:
    sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from _harness import command_of, describe_machine

    content: dict[str, Any] = {
        "tool": "faults",
        "command": command_of("tests/faults", words),
        "seed": seed,
        "machine": describe_machine(),
        "versions": versions(),
        "seconds": round(seconds, 1),
        "rows": [
            {"kind": kind, "tried": tried, "outcomes": outcomes, "unexpected": wrong}
            for kind, tried, outcomes, wrong in table(verdicts)
        ],
        "cases": len(verdicts),
        "hooks": dict(Counter(verdict.case.hook for verdict in verdicts)),
        "policies": dict(Counter(verdict.case.policy for verdict in verdicts)),
        "unexpected": {str(v.case): v.wrong for v in verdicts if v.wrong},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
