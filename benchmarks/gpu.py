"""What training costs on a GPU: APT against a bare loop like nanoGPT's, part by part.

Rows are measured in order of importance until the budget of time is spent. The report names the
rows that did not fit and those that failed; a failure does not end the others. Without a GPU, or
with ``--dry-run``, every row runs at a small size on the CPU: that shows that the benchmark works,
and its figures mean nothing else.
"""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo
from rich.console import Console
from torch import nn

from _gpu_sides import (
    WARMUP,
    Bench,
    Shape,
    Side,
    bare,
    describe_side,
    nominal_peak,
    timed,
    trainer,
)
from _harness import Report, flags, interleave, new_report
from _texts import pydoc_texts
from apt_core.config import read_profile
from apt_core.device import is_out_of_memory
from apt_core.error_text import cause_of, one_line
from apt_core.inference import generate
from apt_core.kernel import boot
from apt_core.modeling import ModelBuilder
from apt_core.modeling.layers import SwiGLU
from apt_core.parallel.peak import measured_peak_flops
from apt_core.testing import tiny_session
from apt_core.types import GenerationRequest
from apt_plugins.moe.experts import Experts
from apt_plugins.moe.layer import MoELayer
from apt_plugins.moe.router import TopKRouter

QUESTION = "What does training cost on a GPU?"
BUDGET = 420.0
"""Seconds for all rows; with the tests, ``tox -e gpu`` then takes less than ten minutes."""

GOAL_OVER_BARE, GOAL_SHARE = 1.1, 0.5
"""Tokens/s over those of the fastest bare loop, and the share of an H100's nominal bf16 peak."""

REPEATS = 3
"""Copies of the text, enough that no epoch ends in the longest run."""

OURS = ("apt", "apt_compiled", "apt_graphs", "apt_default")
"""The sides that count for the goals; the fastest is taken."""


class NotUsableError(Exception):
    """This machine or installation cannot measure a row; the message says why."""


GPT2 = Shape(12, 12, 768, 50304, batch_size=12, length=1024, turn=5)
ODD_IDS = replace(GPT2, vocab_size=50257)
SMALL = Shape(4, 4, 128, 256, batch_size=16, length=256, turn=20)
ONE_LAYER = Shape(1, 1, 32, 256, batch_size=2, length=32, turn=20)
EXPERTS, TOP_K = (8, 32, 64), 2


@dataclass(frozen=True)
class Row:
    """One measurement. ``seconds`` is about its time on an H100, which the times of earlier rows
    scale to the pace of this machine."""

    name: str
    seconds: float
    measure: Callable[[Report, Bench], None]


def against(
    name: str, shape: Shape, sides: Mapping[str, Side], *, seconds: float, suffix: str = ""
) -> Row:
    """A row that times ``sides`` in turns and adds figures ``SIDE_over_BASELINE``.

    The first side is the baseline. Sides that no earlier row described get a line in the tables.
    """
    baseline = next(iter(sides))

    def measure(report: Report, bench: Bench) -> None:
        times = timed(bench, shape, sides)
        for side in sides:
            if side != baseline:
                report.ratio(f"{side}_over_{baseline}{suffix}", times, side, over=baseline)
        report.noise(f"{baseline}_over_{baseline}_of_{name}", times)
        lines = report.raw.setdefault("lines", [])
        known = {found["side"] for found in lines}
        for side_name, side in sides.items():
            unique = f"{side_name}{suffix}"
            if unique not in known:
                seconds = times.median(side_name) / 1e9
                lines.append(describe_side(bench, shape, unique, side, seconds))

    return Row(name, seconds, measure)


BARE, BARE_COMPILED = bare("bare loop"), bare("bare loop, compiled", compiled=True)
APT = trainer("APT")
COMPILED = {"compile": True, "compile_mode": "default"}
GRAPHS = {"compile": True, "compile_mode": "reduce-overhead"}
APT_COMPILED = trainer("APT, compiled", training=COMPILED)
APT_GRAPHS = trainer("APT, compiled with graphs", training=GRAPHS)
APT_DEFAULT = trainer("APT by default", training={"compile": "auto", "mixed_precision": "auto"})
EXACT = {"tf32": False}

CHANGES = {
    "fp32": trainer("APT, fp32 (TF32)", training={"mixed_precision": False}, fp32=True),
    "muon": trainer("APT, Muon", training={"optimizer_name": "muon"}),
    "average": trainer("APT, averaged weights", training={"ema_decay": 0.999}),
}
"""Changes to APT's eager run, one per row."""

ATTENTIONS = {
    "gqa": {"num_kv_heads": 1},
    "tva": {"attention_name": "tva_default"},
    "flash_v2": {"attention_name": "flash_v2"},
    "flex": {"attention_name": "flex", "flex": {"window": 256}},
    "linear_causal": {"attention_name": "linear_causal"},
}
LONG = 8192
"""Tokens of the rows in which a layer of attention is alone, against ``mha``."""


def changed(name: str) -> Row:
    return against(name, GPT2, {"apt": APT, f"apt_{name}": CHANGES[name]}, seconds=15)


def attention(name: str) -> Row:
    parts = ATTENTIONS[name]
    side = trainer(f"APT, {name}", parts, nanogpt=False)
    row = against(f"attention_{name}", GPT2, {"apt": APT, name: side}, seconds=15)

    def measure(report: Report, bench: Bench) -> None:
        require_attention(str(parts.get("attention_name", "mha")))
        row.measure(report, bench)

    return replace(row, measure=measure)


def measure_long(report: Report, bench: Bench, name: str) -> None:
    """A layer of attention over ``mha``'s, forward and backward, on one long sequence."""
    parts = ATTENTIONS[name]
    attention_name = str(parts.get("attention_name", "mha"))
    require_attention(attention_name)
    shape, cuda = bench.sized(GPT2), bench.device.type == "cuda"
    length = LONG if cuda else shape.length

    def backward(name: str, parts: Mapping[str, Any]) -> Callable[[], None]:
        sizes = {"d_model": shape.d_model, "num_heads": shape.num_heads, "max_seq_len": length}
        kernel = boot({"name": "gpu", "model": {**sizes, "attention_name": name, **parts}})
        layer = ModelBuilder(kernel.config, kernel.registry).build_block().attention
        layer.to(bench.device)
        x = torch.randn(1, length, shape.d_model, device=bench.device, requires_grad=True)
        wanted = [x, *layer.parameters()]

        def step() -> None:
            with bench.autocast():
                y = layer(x)
            torch.autograd.grad(y, wanted, torch.ones_like(y))
            bench.synchronize()

        step()  # it may be compiled
        return step

    sides = {"mha": backward("mha", {}), name: backward(attention_name, parts)}
    times = interleave(sides, baseline="mha", rounds=4 * bench.rounds, calls=1)
    report.ratio(f"{name}_over_mha_long", times, name, over="mha")
    report.add(f"{name}_long_ms", times.median(name) / 1e6)


def require_attention(name: str) -> None:
    registry = boot({"name": "gpu", "model": {"attention_name": name}}).registry
    registry.get("attention", name)
    used = registry.resolutions["attention", name]
    if used.used != name:
        raise NotUsableError(used.reason)


def of_base(label: str, **training: Any) -> Side:
    """The model of the shipped profile ``base``, whose cost is that of launches."""
    model = read_profile("base").data["model"]
    sizes = [key for key in SMALL.model() if not key.endswith("_name")]
    parts = {key: value for key, value in model.items() if key not in sizes}
    return trainer(label, parts, training, nanogpt=False)


def measure_saving(report: Report, bench: Bench) -> None:
    """How long the loop waits for a checkpoint, and how much longer all steps take, including those
    during which a thread writes it."""
    shape, saves = bench.sized(GPT2), 2
    every = shape.turn * max(1, (WARMUP + bench.rounds) // saves)
    saving = trainer("saving", training={"save_every_steps": every, "keep_last": 1})
    times = timed(bench, GPT2, {"silent": APT, "saving": saving})
    silent, samples = times.samples["silent"], times.samples["saving"]
    taken = (shape.turn * (max(samples) - times.median("saving"))) / 1e6
    report.add("save_stall_ms", taken, samples={"silent": silent, "saving": samples})
    report.add("saving_over_silent", sum(samples) / sum(silent))


def measure_experts(report: Report, bench: Bench, experts: int) -> None:
    """A layer of experts over a dense layer of equal FLOPs, forward and backward."""
    cuda = bench.device.type == "cuda"
    tokens, width, hidden = (12 * 1024, 768, 1536) if cuda else (64, 32, 64)

    def backward(layer: nn.Module) -> Callable[[], None]:
        layer.to(bench.device)
        x = torch.randn(1, tokens, width, device=bench.device, requires_grad=True)
        wanted = [x, *layer.parameters()]

        def step() -> None:
            with bench.autocast():
                y = layer(x)
            torch.autograd.grad(y, wanted, torch.ones_like(y))
            bench.synchronize()

        return step

    sides = {
        "dense": backward(SwiGLU(width, TOP_K * hidden)),
        "moe": backward(
            MoELayer(
                TopKRouter(width, experts, TOP_K), Experts(experts, width, hidden), top_k=TOP_K
            )
        ),
    }
    times = interleave(sides, baseline="dense", rounds=4 * bench.rounds, calls=1)
    report.ratio(f"moe_E{experts}_over_dense", times, "moe", over="dense")
    report.add(f"moe_E{experts}_ms", times.median("moe") / 1e6)
    if cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
        sides["moe"]()
        report.add(f"moe_E{experts}_gib", torch.cuda.max_memory_allocated(bench.device) / 2**30)


def measure_decoding(report: Report, bench: Bench) -> None:
    shape = bench.sized(GPT2)
    profile = {"model": shape.model(), "hardware": {"device": str(bench.device)}}
    session = replace(tiny_session(profile=profile), dtype=bench.dtype)
    request = GenerationRequest(prompt="The ", max_new_tokens=shape.length // 2, temperature=0.0)

    def decode() -> None:
        generate(session, request)
        bench.synchronize()

    times = interleave({"decode": decode}, baseline="decode", rounds=3, calls=1, warmup=1)
    seconds = times.median("decode") / 1e9
    report.add("decoded_tokens_per_second", round(request.max_new_tokens / seconds, 1))


ROWS: Sequence[Row] = (
    against("eager", GPT2, {"bare": BARE, "apt": APT}, seconds=20),
    against(
        "compiled",
        GPT2,
        {"bare_compiled": BARE_COMPILED, "apt_compiled": APT_COMPILED},
        seconds=90,
    ),
    *(Row(f"experts_E{n}", 8, partial(measure_experts, experts=n)) for n in EXPERTS),
    changed("muon"),
    Row("saving", 20, measure_saving),
    against(
        "one_layer",
        ONE_LAYER,
        {"bare": BARE, "apt": APT, "apt_graphs": APT_GRAPHS},
        seconds=30,
        suffix="_one_layer",
    ),
    against(
        "base_profile",
        SMALL,
        {
            "base": of_base("base profile"),
            "base_compiled": of_base("base profile, compiled", **COMPILED),
            "base_graphs": of_base("base profile, compiled with graphs", **GRAPHS),
        },
        seconds=60,
    ),
    attention("tva"),
    against(
        "vocabulary",
        GPT2,
        {
            "apt": APT,
            "apt_50257": replace(APT, label="APT, 50,257 ids", shape=ODD_IDS),
            "bare_50257": bare("bare loop, 50,257 ids", shape=ODD_IDS),
        },
        seconds=25,
    ),
    Row("decoding", 20, measure_decoding),
    changed("fp32"),
    # The precision of fp32 is a setting of the process, so all sides of a row share it.
    against(
        "fp32_exact",
        GPT2,
        {
            "apt": trainer("APT", hardware=EXACT),
            "apt_fp32_exact": trainer(
                "APT, fp32 without TF32",
                training={"mixed_precision": False},
                hardware=EXACT,
                nanogpt=False,
            ),
        },
        seconds=40,
    ),
    changed("average"),
    attention("gqa"),
    attention("flash_v2"),
    attention("flex"),
    attention("linear_causal"),
    *(
        Row(f"long_{name}", 8, partial(measure_long, name=name))
        for name in ("flash_v2", "flex", "linear_causal")
    ),
    against(
        "default",
        GPT2,
        {"bare_compiled": BARE_COMPILED, "apt_default": APT_DEFAULT, "apt_graphs": APT_GRAPHS},
        seconds=90,
    ),
)
"""The most important rows first: a small budget leaves out the last."""


class Progress:
    """Measures the rows in order, and reports how each ended on stderr and in the report."""

    def __init__(self, report: Report, bench: Bench, budget: float, written: Path | None) -> None:
        self.report, self.bench, self.budget, self.written = report, bench, budget, written
        self.began = perf_counter()
        self.expected = self.taken = 0.0
        self.outcomes: list[dict[str, Any]] = report.raw.setdefault("rows", [])
        self.lost = ""

    def take(self, rows: Sequence[Row]) -> None:
        nothing = {"outcome": "not begun", "reason": "", "seconds": 0.0}
        self.outcomes += [{"row": row.name, **nothing} for row in rows]
        for number, (row, told) in enumerate(zip(rows, self.outcomes, strict=True), 1):
            print(f"[{number}/{len(rows)}] {row.name} ...", file=sys.stderr, flush=True)
            told["outcome"] = "not ended"
            self._write()
            told |= self._outcome(row)
            print(
                f"[{number}/{len(rows)}] {row.name}: {told['outcome']}"
                f"{' (' + told['reason'] + ')' if told['reason'] else ''}, "
                f"{told['seconds']:.1f} s; {perf_counter() - self.began:.0f} s of "
                f"{self.budget:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        self._write()

    def _write(self) -> None:
        """Write the figures so far: a killed benchmark leaves them, and names its row."""
        raw = self.report.raw
        raw["goals"] = [] if self.bench.device.type == "cpu" else goals(raw.get("lines", []))
        if self.written:
            self.report.write(self.written)

    def _outcome(self, row: Row) -> dict[str, Any]:
        if self.lost:
            return {"outcome": "failed", "reason": self.lost, "seconds": 0.0}
        pace = max(1.0, self.taken / self.expected) if self.expected else 1.0
        left = self.budget - (perf_counter() - self.began)
        if row.seconds * pace > left and self.bench.device.type != "cpu":
            reason = f"about {row.seconds * pace:.0f} s, and {max(0.0, left):.0f} s are left"
            return {"outcome": "left out", "reason": reason, "seconds": 0.0}
        outcome, reason, began = "measured", "", perf_counter()
        try:
            row.measure(self.report, self.bench)
        except NotUsableError as error:
            outcome, reason = "not usable", str(error)
        except Exception as error:
            outcome, reason = "failed", reason_of(error)
            self.lost = lost_by(self.bench, row)
        seconds = perf_counter() - began
        if outcome == "measured":
            self.expected, self.taken = self.expected + row.seconds, self.taken + seconds
        self._clean_up()
        return {"outcome": outcome, "reason": reason, "seconds": round(seconds, 2)}

    def _clean_up(self) -> None:
        """Empty memory, disk and the compiler's caches for the next row."""
        torch._dynamo.reset()  # it compiles only a few models of one class
        gc.collect()
        if self.bench.device.type == "cuda" and not self.lost:
            torch.cuda.empty_cache()
            # Runs that overlap may put back each other's setting.
            torch.set_float32_matmul_precision("high")
        for folder in self.bench.folder.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)


def lost_by(bench: Bench, row: Row) -> str:
    """Why the device is unusable after ``row``, as after a failed kernel; empty if it works."""
    try:
        bench.synchronize()
    except RuntimeError as error:
        return f"the device does not answer since {row.name}: {one_line(error)}"
    return ""


def reason_of(error: BaseException) -> str:
    """The error and its root cause in one line."""
    if is_out_of_memory(error):
        return f"out of memory: {one_line(error)}"
    root = error
    while (cause := cause_of(root)) is not None:
        root = cause
    return one_line(error) if root is error else f"{one_line(error)} <- {one_line(root)}"


def goals(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The goals with the measured values, None where there is none."""
    pace = {found["side"]: found["tokens_per_second"] for found in lines}
    bares = [value for side, value in pace.items() if side in ("bare", "bare_compiled")]
    ours = {side: pace[side] for side in OURS if side in pace}
    best = max(ours, key=lambda side: ours[side], default="")
    shares = [found.get("share_of_nominal_peak") for found in lines if found["side"] == best]
    whole = "bare_compiled" in pace  # nanoGPT's loop is compiled
    rows = (
        ("tokens/s over those of the bare loop", GOAL_OVER_BARE,
         ours[best] / max(bares) if ours and whole else None),
        ("share of the nominal bf16 peak", GOAL_SHARE, shares[0] if shares else None),
    )  # fmt: skip
    return [
        {
            "goal": text,
            "wanted": wanted,
            "measured": measured,
            "met": None if measured is None else measured >= wanted,
            "by": best,
        }
        for text, wanted, measured in rows
    ]


def measure(report: Report, bench: Bench, budget: float, written: Path | None) -> bool:
    """Measure all rows; return whether none failed."""
    cuda = bench.device.type == "cuda"
    report.raw["dry_run"] = not cuda
    if cuda:
        properties = torch.cuda.get_device_properties(bench.device)
        report.machine["gpu"] = properties.name
        report.machine["gpu_gib"] = round(properties.total_memory / 2**30, 1)
        report.versions["cuda"] = str(torch.version.cuda)
        peak = measured_peak_flops(bench.device, torch.bfloat16)
        report.add("measured_bf16_peak_tflops", peak / 1e12)
        if nominal := nominal_peak(bench):
            report.add("nominal_bf16_peak_tflops", nominal / 1e12)
    else:
        report.note("A dry run: sizes are tiny, and the figures only show that every row runs.")
    progress = Progress(report, bench, budget, written)
    progress.take(ROWS)
    add_tables(report)
    return all(row["outcome"] != "failed" for row in progress.outcomes)


COLUMNS = {
    "label": "side",
    "step_ms": "ms a step",
    "tokens_per_second": "tokens/s",
    "share_of_measured_peak": "of peak",
    "share_of_nominal_peak": "of nominal",
    "gib": "GiB",
    "launches": "launches",
    "kernels": "kernels",
}


def add_tables(report: Report) -> None:
    """Add a table for each shape, for the rows without a figure, and for the goals."""
    lines = report.raw.get("lines", [])
    for shape in dict.fromkeys(found["shape"] for found in lines):
        rows = [
            [found.get(key, "") for key in COLUMNS] for found in lines if found["shape"] == shape
        ]
        report.table(shape, list(COLUMNS.values()), rows)
    missing = [row for row in report.raw["rows"] if row["outcome"] != "measured"]
    if missing:
        report.table(
            "Without a figure",
            ["row", "outcome", "why"],
            [[row["row"], row["outcome"], row["reason"]] for row in missing],
        )
    if report.raw["goals"]:
        report.table(
            "Goals, which are for an H100",
            ["goal", "wanted", "measured", "met"],
            [
                [
                    goal["goal"],
                    goal["wanted"],
                    "not measured" if goal["measured"] is None else goal["measured"],
                    {None: "", True: "yes", False: "no"}[goal["met"]],
                ]
                for goal in report.raw["goals"]
            ],
        )


@contextmanager
def benched(device: torch.device, quick: bool) -> Iterator[Bench]:
    train, val = pydoc_texts()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rounds = 1
        gc.collect()
        gc.freeze()  # collections between rounds skip what is imported
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            rounds = 3 if quick else 6
            train *= REPEATS
        else:
            torch.set_num_threads(1)
            # A dry run needs no compiler, and does not wait a minute for one.
            compiled = partial(torch.compile, backend="eager")
            stack.enter_context(patch.object(torch, "compile", compiled))
            train, val = train[:20_000], val[:5_000]
        yield Bench(device, folder, train, val, rounds)


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags(QUESTION)
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        metavar="SECONDS",
        help=f"leave out the rows that do not fit in so much time (default: {BUDGET:.0f})",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="take all rows at a small size on the CPU"
    )
    options = parser.parse_args(argv)
    report = new_report(QUESTION, parser, ["torch"])
    cuda = torch.cuda.is_available() and not options.dry_run
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    with benched(device, options.quick) as bench:
        passed = measure(report, bench, options.budget, options.json)
    if options.json:
        report.write(options.json)
    report.show(Console())
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
