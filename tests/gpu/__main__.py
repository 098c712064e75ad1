"""All that is to be done on a GPU, in less than ten minutes: the tests that are marked ``gpu``, and
benchmarks/gpu.py. `tox -e gpu` makes an environment for it first.

python tests/gpu                       # writes gpu-results/{tests,benchmark,summary}.json
python tests/gpu --results FOLDER
python tests/gpu --dry-run             # as on a machine without a GPU, anywhere
python tests/gpu tests/gpu/test_training.py   # these tests only, and the benchmark

Without a GPU every test is skipped, and the benchmark takes all its rows at a small size: that
shows that the command works, and "dry_run" in its files says that the figures mean nothing. A GPU
that torch cannot use is an error: exit code 2. Otherwise 1 when a test or a row has failed, or did
not end in its time.

A test is marked with ``@pytest.mark.gpu``, in this folder or beside its likes on a CPU. It computes
on "cuda", ends within seconds (TEST_SECONDS is the most), leaves no process behind, and asserts no
time. What needs more than one GPU skips itself, with the reason. Try its body on a CPU first.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from apt_core.device import has_nvidia_gpu

ROOT = Path(__file__).resolve().parents[2]
TEST_SECONDS = 120
"""After which a test has failed."""

LIMIT = 600.0
"""Seconds of all together; the tests have TESTS_SHARE of it."""

TESTS_SHARE = 0.55
MARGIN = 20.0
"""Seconds that the benchmark's last row may take longer than was expected."""

PYPI = "https://pypi.org/simple"
OLDER = "https://download.pytorch.org/whl/cu126"

LOOK = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "error": ""}
try:
    torch.cuda.init()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found["gpus"].append(f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB")
except Exception as error:
    found["error"] = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
print(json.dumps(found))
"""
"""In a process of its own: CUDA keeps memory in each that has asked it."""


def look() -> dict[str, Any]:
    """What torch finds."""
    ended = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def not_usable(found: Mapping[str, Any]) -> str:
    """What to do about a GPU that torch cannot use."""
    if found["cuda"] is None:
        why = f"torch {found['torch']} is a build without CUDA, from an index of CPU builds"
        hint = (
            "PyPI's build has CUDA: take it again without the other index, by "
            f"PIP_CONFIG_FILE=/dev/null PIP_INDEX_URL={PYPI} PIP_EXTRA_INDEX_URL= tox run -r -e gpu"
        )
    else:
        why = f"torch {found['torch']} (CUDA {found['cuda']}) cannot use it: {found['error']}"
        hint = (
            "too old a driver needs a build for an older CUDA, if there is one: "
            f"PIP_EXTRA_INDEX_URL={OLDER} tox run -r -e gpu"
        )
    return f"this machine has a GPU, but {why}\n{hint}\n--dry-run does without it"


def run(command: Sequence[str | Path], seconds: float, hide: bool) -> int | None:
    """The exit code of ``command``, None where it was ended after ``seconds``."""
    environment = dict(os.environ)
    if hide:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    # A session of its own: what it has started ends with it.
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    code: int | None = None
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"ended after {seconds:.0f} s", file=sys.stderr)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return code


def read(path: Path) -> dict[str, Any]:
    """What a part has written, or nothing where it came to nothing."""
    content: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return content


def judge_tests(code: int | None, found: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Has every test passed or been skipped, and what people are to read of it?"""
    tests = found.get("tests", [])
    counts = found.get("counts", {})
    said = ", ".join(f"{counts.get(name, 0)} {name}" for name in ("passed", "failed", "skipped"))
    lines = [f"tests: {said} in {found.get('seconds', 0):.0f} s"]
    lines += [f"  failed  {t['test']}: {t['reason']}" for t in tests if t["outcome"] == "failed"]
    skipped: dict[str, int] = {}
    for test in tests:
        if test["outcome"] == "skipped":
            skipped[test["reason"]] = skipped.get(test["reason"], 0) + 1
    lines += [f"  skipped {number}: {reason}" for reason, number in skipped.items()]
    if not found.get("ended"):
        lines.append(f"  did not end; was in {found.get('running') or 'none of them'}")
    elif code and not counts.get("failed"):
        lines.append(f"  pytest ended with exit code {code}")
    return code == 0, lines


def judge_benchmark(code: int | None, found: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Has every row that fits been measured, and what people are to read of it?"""
    raw = found.get("raw", {})
    rows, lines = raw.get("rows", []), []
    outcomes: dict[str, int] = {}
    for row in rows:
        outcomes[row["outcome"]] = outcomes.get(row["outcome"], 0) + 1
        if row["outcome"] != "measured":
            why = f" ({row['reason']})" if row["reason"] else ""
            lines.append(f"  {row['outcome']}: {row['row']}{why}")
    said = ", ".join(f"{number} {name}" for name, number in outcomes.items()) or "nothing measured"
    lines.insert(0, f"benchmark: {said} in {sum(row['seconds'] for row in rows):.0f} s")
    for goal in raw.get("goals", []):
        if goal["met"] is None:
            told = "not measured"
        else:
            told = f"{goal['measured']:.3g} by {goal['by']}, {'met' if goal['met'] else 'NOT met'}"
        lines.append(f"  goal: {goal['goal']}, on an H100 {goal['wanted']}: {told}")
    if code is None:
        lines.append("  did not end in its time")
    elif code and "failed" not in outcomes:
        lines.append(f"  ended with exit code {code}")
    return code == 0, lines


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python tests/gpu", None, __doc__, formatter_class=raw)
    parser.add_argument("--results", type=Path, default=ROOT / "gpu-results", metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="as on a machine without a GPU")
    parser.add_argument("tests", nargs="*", default=[str(ROOT / "tests")], help="pytest's paths")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    found = look()
    dry = options.dry_run or not found["gpus"]
    if dry and not options.dry_run and has_nvidia_gpu():
        print(not_usable(found), file=sys.stderr)
        return 2
    where = "no GPU: a dry run, whose figures mean nothing" if dry else "; ".join(found["gpus"])
    head = f"{where} (torch {found['torch']}, CUDA {found['cuda']})"
    print(head, flush=True)
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    tests, benchmark = results / "tests.json", results / "benchmark.json"
    for old in (tests, benchmark):
        old.unlink(missing_ok=True)

    pytest = ["-m", "gpu", "-q", f"--timeout={TEST_SECONDS}", "-p", "no:cacheprovider"]
    pytest += ["--continue-on-collection-errors"]
    command = [sys.executable, ROOT / "tests/gpu/gpu_outcomes.py", tests, *pytest]
    code = run([*command, *options.tests], TESTS_SHARE * LIMIT, hide=dry)
    tested, lines = judge_tests(code, read(tests))

    left = LIMIT - (time.perf_counter() - began)
    flags = ["--json", benchmark, "--budget", f"{left - 2 * MARGIN:.0f}"]
    flags += ["--dry-run", "--quick"] if dry else []
    code = run([sys.executable, ROOT / "benchmarks/gpu.py", *flags], left - MARGIN, hide=dry)
    measured, more = judge_benchmark(code, read(benchmark))

    content = {
        "dry_run": dry,
        **{name: found[name] for name in ("torch", "cuda", "gpus")},
        "passed": tested and measured,
        "seconds": round(time.perf_counter() - began, 1),
        "summary": [*lines, *more],
    }
    for path in (tests, benchmark):
        if part := read(path):
            path.write_text(json.dumps({"dry_run": dry, **part}, indent=1) + "\n", "utf-8")
    (results / "summary.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    print("", head, *lines, *more, f"files: {results}, {content['seconds']:.0f} s", sep="\n")
    return 0 if tested and measured else 1


if __name__ == "__main__":
    sys.exit(main())
