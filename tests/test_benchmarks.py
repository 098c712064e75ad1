"""The benchmarks' harness and the page of figures; the figures themselves are no tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

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

TURNS = """
from _turns import take_turns

log = []


def loop(name, steps=15):
    def run(fetched):
        for step in range(steps):
            fetched()
            log.append(name)
        return name

    return run


def broken(fetched):
    fetched()
    raise OSError("out of text")


times = take_turns({"a": loop("a"), "b": loop("b")}, baseline="a", rounds=5, warmup=2, steps=2)
assert len(log) == 3 * 15 and times.steps == 15
assert times.results == {"a": "a", "b": "b"}
# Two steps a turn, the baseline twice a round, from another side each round.
rounds = ["".join(log[first : first + 6]) for first in range(0, 42, 6)]
assert set(rounds) == {"aabbaa", "bbaaaa", "aaaabb"}, rounds
for kind in (times.cpu, times.wall):
    series = [*kind.samples.values(), kind.again]
    assert len(series) == 3 and all(len(one) == 5 and min(one) > 0 for one in series)

ended = []


def held(fetched):
    try:
        while True:
            fetched()
    finally:
        ended.append("held")


for wrong in (broken, loop("b", steps=3), loop("b", steps=0)):
    try:
        take_turns({"a": held, "b": wrong}, baseline="a", rounds=5, warmup=2, steps=2)
    except (OSError, RuntimeError) as error:
        print(error)
assert ended == ["held"] * 5, "a loop beside one that failed keeps what it holds"
"""

OVERHEAD = """
import torch

from _bare import NanoGPT, Recipe, random_windows, train
from _harness import Report
from trainer_overhead import NANO, SHAPES, Shape, measure

shape = Shape("Small", 1, 1, 16, batch_size=2, length=8, turn=5, rounds=20)
SHAPES.clear()
SHAPES["small"] = shape
report = Report("?", {}, {})
measure(report, quick=True, sides=("bare", "apt", "apt10"))
ratios = {name for name in report.figures if name.endswith("_over_bare_small")}
assert ratios == {"apt_over_bare_small", "apt10_over_bare_small", "bare_over_bare_small"}
(table,) = report.raw["tables"]
bare, plain, observed = (row[-1] for row in table["rows"])
assert plain == observed, "observers changed the training"
assert bare < 5.5 and plain < 5.5, "a side has not learned anything"

model = NanoGPT()
width = NANO.d_model
assert sum(p.numel() for p in model.parameters()) == (
    (256 + 64) * width + NANO.num_layers * (12 * width**2 + 2 * width) + width
)
torch.manual_seed(0)
small = NanoGPT(vocab_size=8, length=8, num_layers=1, num_heads=2, d_model=16)
tokens = torch.arange(200) % 8
batch = lambda: random_windows(tokens, 4, 8)
inputs, targets = batch()
assert torch.equal(targets, (inputs + 1) % 8)
ahead = small(inputs.clone().index_fill_(1, torch.tensor([7]), 0))
assert torch.allclose(ahead[:, :7], small(inputs)[:, :7]), "a token sees those after it"
recipe = Recipe(steps=150, batch_size=4, length=8, warmup_steps=10, learning_rate=1e-2)
assert recipe.learning_rate_at(10) == 1e-2 and recipe.learning_rate_at(150) == 1e-4
train(small, small.loss, batch, recipe)
assert small.loss(inputs, targets) < 0.2
"""

LOADING = """
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import data
from apt_core.data.packing.concat import ConcatWindows
from apt_core.data.tokenizers.byte import ByteTokenizer

data.BATCH, data.SEQ_LEN = 4, 64
folder = Path(tempfile.mkdtemp())
assert len(data.write_corpus(folder / "text.jsonl", 100_000)) > 2
with data.own_cache():
    store = data.store_of(folder / "text.jsonl", ByteTokenizer())
    data.start(folder / "text.jsonl")
    part = store.part("train")
    rows = data.saved_rows(part, folder / "rows")
    ids = part.read(0, part.num_tokens)
    known = {ids[at : at + 65].tobytes() for at in range(0, len(ids) - 64, 65)}
    sides = data.forms_of_datasets(rows)
    assert set(data.DOCUMENTED) < set(sides)
    for name, call in sides.items():
        seen = []
        for _ in range(3):
            inputs, targets = call()
            assert inputs.shape == targets.shape == (4, 64) and inputs.dtype == torch.int64, name
            taken = torch.cat([inputs, targets[:, -1:]], 1).numpy().astype(np.uint8)
            seen += [row.tobytes() for row in taken]
        assert set(seen) <= known and len(set(seen)) > 6 and seen != list(known)[:12], name
    batch = data.batches_of(data.plan_of(ConcatWindows(part, 64), 4))()
    assert batch.input_ids.shape == (4, 64) and batch.num_targets == 256
    assert data.seek_seconds() > 0
"""

LEAKS = """
from soak import Look, judged

def verdicts(objects, pace=lambda n: 1.0):
    seconds, looks = 0.0, []
    for n in range(200):
        seconds += 500 / pace(n)
        looks.append(Look(500 * n, seconds, 300.0, 9, 1, objects(n), 0.2))
    return {row["kind"]: row["unexpected"] for row in judged(looks)}

flat = verdicts(lambda n: 1000.0 + 3000 * (n > 9) + n % 7)
assert sum(flat.values()) == 0, flat
leaking = verdicts(lambda n: 1000.0 + 10 * n + n % 7)
assert leaking.pop("objects that the garbage collector knows") and not sum(leaking.values())
slower = verdicts(lambda n: 1000.0, pace=lambda n: 100 - n / 4)
assert slower.pop("steps per second") and not sum(slower.values())
"""

GPU_ROWS = """
import json
from pathlib import Path
from time import sleep

import torch

import gpu
from gpu import Bench, NotUsableError, Progress, Report, Row, goals

def out_of_memory(report, bench):
    try:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")
    except RuntimeError as error:
        raise ValueError("the run has failed") from error

def not_here(report, bench):
    raise NotUsableError("no such kernel")

def breaks(report, bench):
    rows = json.loads(written.read_text())["raw"]["rows"]
    assert [row["outcome"] for row in rows[-2:]] == ["not ended", "not begun"]
    Bench.synchronize = lost
    raise RuntimeError("an illegal memory access")

def lost(bench):
    raise RuntimeError("CUDA error")

torch.cuda.empty_cache = lambda: None
Bench.synchronize = lambda bench: None
folder = Path("kept"); folder.mkdir(); (folder / "run").mkdir()
report = Report("?", {}, {})
bench = Bench(torch.device("cuda", 0), folder, "", "", 1)
written = Path("rows.json")
rows = [
    Row("good", 0.01, lambda report, bench: sleep(0.1)),
    Row("memory", 0.01, out_of_memory),
    Row("kernel", 0.01, not_here),
    Row("long", 1000, breaks),
    Row("breaks", 0.01, breaks),
    Row("after", 0.01, not_here),
]
Progress(report, bench, 6000, written).take(rows)
assert written.exists() and not list(folder.iterdir())
told = {row["row"]: (row["outcome"], row["reason"]) for row in report.raw["rows"]}
assert list(told) == [row.name for row in rows]
assert told["good"] == ("measured", "")
assert told["memory"][0] == "failed" and told["memory"][1].startswith("out of memory: ValueError")
assert told["kernel"] == ("not usable", "no such kernel")
# Ten times as slow as was expected: what would have fit does not.
assert told["long"][0] == "left out" and "s are left" in told["long"][1], told
assert told["breaks"] == ("failed", "RuntimeError: an illegal memory access")
assert told["after"] == (
    "failed", "the device does not answer since breaks: RuntimeError: CUDA error"
)

peaks = {
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA RTX A1000": None,
}
for name, peak in peaks.items():
    torch.cuda.get_device_name = lambda device: name
    assert gpu.nominal_peak(bench) == peak, name

def lines(**pace):
    return [{"side": side, "tokens_per_second": value} for side, value in pace.items()]

unknown, _ = goals(lines(apt=2.0, bare=1.0))
assert unknown["measured"] is None and unknown["met"] is None, "nanoGPT's loop is compiled"
over, share = goals(lines(apt=2.0, apt_compiled=3.0, bare=1.0, bare_compiled=3.0))
assert (over["measured"], over["met"], over["by"]) == (1.0, False, "apt_compiled")
assert share["measured"] is None
known = lines(apt=4.0, bare_compiled=3.0)
known[0]["share_of_nominal_peak"] = 0.5
assert [goal["met"] for goal in goals(known)] == [True, True]
"""

Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def python(tmp_path: Path, forked: None) -> Python:
    """Runs a script of the benchmarks, and asserts how it ends."""

    def call(script: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            [sys.executable, script, *map(str, arguments)],
            env={"PYTHONPATH": f"{BENCHMARKS}:{ROOT}", "HOME": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == code, ended.stderr
        return ended

    return call


def test_the_sides_of_the_data_benchmark_deliver_the_same_text(
    python: Python, tmp_path: Path
) -> None:
    pytest.importorskip("datasets", reason="datasets is the peer")
    script = tmp_path / "loading.py"
    script.write_text(LOADING)
    (printed,) = python(script).stdout.splitlines()
    figures = json.loads(printed)
    assert set(figures) == {
        *("start_seconds", "resident_mb", "resident_of_imports_mb", "unshared_mb")
    }
    assert 0 < figures["unshared_mb"] < figures["resident_mb"] + figures["resident_of_imports_mb"]


def test_a_benchmark_says_what_has_to_be_installed(python: Python, tmp_path: Path) -> None:
    script = tmp_path / "peers.py"
    script.write_text(SLEEPS.replace('"pluggy"', '"no-such-peer"'))
    assert "no-such-peer is missing: pip install" in python(script, "--quick", code=2).stderr


def test_a_result_becomes_a_page_that_goes_out_of_date_with_it(
    python: Python, tmp_path: Path
) -> None:
    for module in ("figure", "style", "backends.backend_svg"):  # once, and not in each fork
        pytest.importorskip(f"matplotlib.{module}", reason="matplotlib draws the plots")
    script, result = tmp_path / "sleeps.py", tmp_path / "results" / "sleeps.json"
    script.write_text(SLEEPS)
    printed = python(script, "--quick", "--json", result).stdout
    assert "How long is a sleep?" in printed and "long_over_short" in printed
    content = json.loads(result.read_text())
    assert content["figures"]["long_over_short"] > 0

    page, figure = tmp_path / "page.md", tmp_path / "figures" / "sleeps-asked.svg"
    faults = tmp_path / "reliability.md"
    faults.write_text("Before\n<!-- rendered: begin -->\nold\n<!-- rendered: end -->\nafter\n")
    row = {"kind": "flips", "tried": 7, "outcomes": {"read": 5, "refused": 2}, "unexpected": 1}
    told = {"command": "try it", "seed": 3, "seconds": 4.2, "rows": [row]}
    for name in ("faults", "chaos", "fuzz"):
        (result.parent / f"{name}.json").write_text(json.dumps({"tool": name, **told}))
    where = ("--results", result.parent, "--page", page, "--reliability", faults)
    missing = python(BENCHMARKS / "render.py", "--check", *where, code=1).stderr
    assert str(page) in missing and str(figure) in missing and str(faults) in missing
    python(BENCHMARKS / "render.py", *where)
    assert (
        "soak.json is missing" in python(BENCHMARKS / "render.py", "--check", *where, code=1).stderr
    )
    grown = {"first": 1.0, "last": 1.5, "growth": 0.5, "interval": [0.4, 0.6]}
    soak = told | {"rows": [row | grown], "steps": 9, "plugins": {"a": "active"}}
    (result.parent / "soak.json").write_text(json.dumps(soak))
    python(BENCHMARKS / "render.py", *where)
    tables = faults.read_text()
    assert tables.startswith("Before\n") and tables.endswith("\nafter\n") and "old" not in tables
    assert "| flips | 7 | 6 | 1 | 5 read, 2 refused |" in tables
    assert "| flips | 1 | 1.5 | 0.5 | 0.4 – 0.6 | read |" in tables
    assert "Again: `try it`, seed 3." in tables
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


def test_loops_take_turns_of_whole_steps_and_their_errors_surface(
    python: Python, tmp_path: Path
) -> None:
    script = tmp_path / "turns.py"
    script.write_text(TURNS)
    assert python(script).stdout.splitlines() == [
        "out of text",
        "a loop took fewer steps than were to be timed",
        "a loop took fewer steps than were to be timed",
    ]


def test_the_bare_loop_and_the_trainer_are_timed_while_both_learn(
    python: Python, tmp_path: Path
) -> None:
    script = tmp_path / "overhead.py"
    script.write_text(OVERHEAD)
    python(script)


def test_the_command_for_a_gpu_takes_every_row_on_a_cpu(python: Python, tmp_path: Path) -> None:
    ended = python(
        ROOT / "tests/gpu", "--dry-run", "--results", tmp_path, ROOT / "tests/gpu/test_training.py"
    )
    summary, tests, content = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("summary", "tests", "benchmark")
    )
    assert summary["passed"] and summary["dry_run"] and tests["dry_run"] and content["dry_run"]
    assert tests["counts"]["skipped"] == len(tests["tests"]) > 5
    assert {row["reason"] for row in tests["tests"]} == {"no CUDA device here"}
    assert summary["summary"][0].startswith("tests: 0 passed, 0 failed")
    assert "dry run, whose figures mean nothing" in ended.stdout
    figures, raw = content["figures"], content["raw"]
    assert raw["dry_run"] is True and raw["goals"] == []
    assert "figures only show that every row runs" in raw["notes"][0]
    outcomes = {row["row"]: row["outcome"] for row in raw["rows"]}
    flash = dict.fromkeys(("attention_flash_v2", "long_flash_v2"), "not usable")
    assert outcomes == dict.fromkeys(outcomes, "measured") | flash, ended.stderr
    for figure in (
        "apt_over_bare",
        "apt_over_bare_one_layer",
        "apt_graphs_over_bare_one_layer",
        *(f"apt_{n}_over_apt" for n in ("muon", "fp32", "fp32_exact", "average", "50257")),
        *(f"apt_{name}_over_bare_compiled" for name in ("compiled", "graphs", "default")),
        *(f"base_{name}_over_base" for name in ("compiled", "graphs")),
        *(f"{name}_over_apt" for name in ("tva", "gqa", "bare_50257", "flex", "linear_causal")),
        *(f"{name}_over_mha_long" for name in ("flex", "linear_causal")),
        *(f"moe_E{experts}_over_dense" for experts in (8, 32, 64)),
        "saving_over_silent",
        "decoded_tokens_per_second",
    ):
        assert figures[figure] > 0
    assert {"side", "step_ms", "tokens_per_second"} <= set(raw["lines"][0])
    assert not any("gib" in line for line in raw["lines"]), "a CPU's memory is no GPU's"


def test_what_the_gpu_benchmark_did_not_measure_is_told(python: Python, tmp_path: Path) -> None:
    script = tmp_path / "rows.py"
    script.write_text(GPU_ROWS)
    python(script)


def test_runs_that_are_hit_again_and_again_end_like_one_left_alone(
    python: Python, tmp_path: Path
) -> None:
    found = tmp_path / "chaos.json"
    ended = python(BENCHMARKS / "chaos.py", "--quick", "--json", found)
    content = json.loads(found.read_text())
    assert content["tool"] == "chaos"
    assert sum(row["tried"] for row in content["rows"]) >= 8, ended.stdout
    assert all(row["unexpected"] == 0 for row in content["rows"])


def test_a_leak_is_told_from_a_pool_that_fills(python: Python, tmp_path: Path) -> None:
    script = tmp_path / "leaks.py"
    script.write_text(LEAKS)
    python(script)
