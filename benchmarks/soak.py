"""Do memory, descriptors and pace of a long run with ten plugins stay constant?

python benchmarks/soak.py --quick                     # 2,000 steps
python benchmarks/soak.py --json benchmarks/results/soak.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor

from _harness import command_of, describe_machine
from apt_core import hookimpl
from apt_core.kernel import boot
from apt_core.plugin_manager import PluginManager
from apt_core.runs.folder import versions
from apt_core.training import Trainer

STEPS, QUICK_STEPS = 100_000, 2_000
LOOKS, QUICK_LOOKS = 200, 40
"""How often the process is measured."""

WARMUP = 0.1
"""The first part of a run, whose figures are not judged: pools fill, plugins are quarantined."""

PROFILE: dict[str, Any] = {
    "name": "soak",
    "model": {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32, "vocab_size": 256,
              "max_seq_len": 16, "dropout": 0.1, "attention_name": "mha"},
    "training": {"batch_size": 2, "max_epochs": 10**6, "learning_rate": 1e-3, "warmup_steps": 10,
                 "log_every_steps": 10, "save_freq": 0, "keep_last": 2, "mixed_precision": False},
    "evaluation": {"eval_batches": 2, "sample_tokens": 4},
    "hardware": {"device": "cpu"},
}  # fmt: skip

TEXT = "".join(
    f"{n} apples and {n + 1} pears are {2 * n + 1} pieces of fruit.\n" for n in range(400)
)


def observing(*names: str) -> object:
    """An observer that implements the hooks ``names`` and does nothing."""
    return type("Observer", (), {name: hookimpl(HOOKS[name]) for name in names})()


HOOKS: dict[str, Callable[..., None]] = {
    "on_epoch_start": lambda self, epoch, trainer: None,
    "on_step_start": lambda self, step, batch, trainer: None,
    "on_backward_end": lambda self, step, trainer: None,
    "on_step_end": lambda self, step, loss, trainer: None,
    "on_metrics": lambda self, metrics, step: None,
    "on_evaluation_start": lambda self, trainer: None,
    "on_evaluation_end": lambda self, trainer, metrics: None,
    "on_epoch_end": lambda self, epoch, trainer: None,
    "on_checkpoint_saved": lambda self, path, trainer: None,
    "on_plugin_failure": lambda self, failure: None,
    "on_generation_start": lambda self, request: None,
    "on_generation_end": lambda self, request, result: None,
}


class Term:
    @hookimpl
    def apt_loss_terms(self, output: Any) -> dict[str, Tensor]:
        return {"square": 1e-4 * output.logits.square().mean()}


class Measures:
    @hookimpl
    def apt_metrics(self, trainer: Any) -> dict[str, float]:
        return {"step": float(trainer.step)}


class Keeps:
    """Saves a tensor and a number in each checkpoint."""

    def __init__(self) -> None:
        self.seen, self.mean = 0, torch.zeros(16)

    @hookimpl
    def on_step_end(self, step: int, loss: Tensor) -> None:
        self.seen += 1
        self.mean = 0.99 * self.mean + 0.01 * loss.detach()

    @hookimpl
    def apt_state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "mean": self.mean}


class Averages:
    @hookimpl
    def on_training_start(self, trainer: Any) -> None:
        trainer.average("averages", 0.99)


class FailsNowAndThen:
    """Raises exceptions with frames and messages of their own."""

    @hookimpl
    def on_evaluation_end(self, trainer: Any) -> None:
        if trainer.step % 20_000 == 0:
            raise RuntimeError(f"now, after step {trainer.step}")


class IsQuarantined:
    @hookimpl
    def on_step_end(self, step: int) -> None:
        raise ValueError(f"step {step}")


class Draws:
    """Draws random numbers and leaves the model in eval mode: the watch undoes both."""

    @hookimpl
    def on_step_end(self, step: int, trainer: Any) -> None:
        torch.rand(3)
        if step % 100 == 0:
            trainer.model.eval()


@dataclass(frozen=True)
class Look:
    """One measurement of the process."""

    step: int
    seconds: float
    rss_mb: float
    descriptors: float
    threads: float
    objects: float
    folder_mb: float


class Looks:
    """Measures the process every ``every`` steps."""

    def __init__(self, every: int, steps: int, folder: Path) -> None:
        self.every, self.steps, self.folder = every, steps, folder
        self.seen: list[Look] = []

    @hookimpl
    def on_step_end(self, step: int) -> None:
        if step % self.every:
            return
        gc.collect()
        saved = (self.folder / "checkpoints").glob("step-*/*.safetensors")
        folder = sum(each.stat().st_size for each in saved)
        self.seen.append(
            Look(
                step,
                time.perf_counter(),
                _resident_bytes() / 2**20,
                len(os.listdir("/proc/self/fd")),
                threading.active_count(),
                len(gc.get_objects()),
                folder / 2**20,
            )
        )
        if step % (self.steps // 10) == 0:
            last = self.seen[-1]
            print(f"step {step:,} of {self.steps:,}: {last.rss_mb:.1f} MB, {last.descriptors:.0f} "
                  f"descriptors, {last.objects:,.0f} objects", flush=True)  # fmt: skip


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# What came of it --------------------------------------------------------------------------------

FLAT: dict[str, tuple[str, float]] = {
    "rss_mb": ("resident memory, MB", 5.0),
    "descriptors": ("open descriptors", 0.5),
    "threads": ("threads", 0.5),
    "objects": ("objects that the garbage collector knows", 500.0),
    "folder_mb": ("weights and states in the run's folder, MB", 0.1),
    "steps_per_s": ("steps per second", 0.0),
}
"""The figures that must stay flat: a description, and the growth over the judged part of the run
that the lower end of its interval may not exceed. The pace may fall by at most ``SLOWER``."""

SLOWER = 0.1
BLOCKS = 18
T_95 = 2.12
"""Student's t of the 95% interval of a slope through BLOCKS points."""


def growth_of(steps: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """The growth of ``values`` from the first step to the last, and its 95% interval (low, high).

    A line is fitted to the medians of blocks, since neighbouring values are not independent.
    """
    size = len(steps) // BLOCKS
    blocks = [slice(n * size, (n + 1) * size) for n in range(BLOCKS)]
    xs = [statistics.fmean(steps[block]) for block in blocks]
    ys = [statistics.median(values[block]) for block in blocks]
    slope, intercept = statistics.linear_regression(xs, ys)
    left = sum((y - intercept - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    mean = statistics.fmean(xs)
    error = sqrt(left / (BLOCKS - 2) / sum((x - mean) ** 2 for x in xs))
    span = steps[-1] - steps[0]
    return slope * span, (slope - T_95 * error) * span, (slope + T_95 * error) * span


def judged(looks: Sequence[Look]) -> list[dict[str, Any]]:
    """A row for each figure: first and last tenth, growth, and whether it is too large."""
    looks = looks[int(len(looks) * WARMUP) :]
    steps = [look.step for look in looks[1:]]
    pace = [
        (after.step - before.step) / (after.seconds - before.seconds)
        for before, after in pairwise(looks)
    ]
    rows = []
    for name, (words, allowed) in FLAT.items():
        values = pace if name == "steps_per_s" else [getattr(look, name) for look in looks[1:]]
        tenth = max(1, len(values) // 10)
        first, last = (statistics.median(part) for part in (values[:tenth], values[-tenth:]))
        growth, low, high = growth_of(steps, values)
        bad = high < -SLOWER * first if name == "steps_per_s" else low > allowed
        rows.append(
            {
                "kind": words,
                "tried": len(values),
                "outcomes": {("slower" if name == "steps_per_s" else "grows"): len(values)}
                if bad
                else {"flat": len(values)},
                "unexpected": int(bad),
                "first": first,
                "last": last,
                "growth": growth,
                "interval": [low, high],
            }
        )
    return rows


def soak(steps: int, count: int, folder: Path) -> tuple[Trainer, Looks]:
    """Train ``steps`` steps with ten plugins, and measure the process ``count`` times."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    every = max(100, steps // 200)
    training = PROFILE["training"] | {"max_steps": steps, "save_every_steps": every}
    evaluation = PROFILE["evaluation"] | {"eval_freq": every}
    data = {"train_path": str(folder / "text.txt")}
    run = folder / "run"
    looks = Looks(steps // count, steps, run)
    plugins: dict[str, object] = {
        "observer": observing(*HOOKS),
        "term": Term(),
        "measures": Measures(),
        "keeps": Keeps(),
        "averages": Averages(),
        "fails_now_and_then": FailsNowAndThen(),
        "is_quarantined": IsQuarantined(),
        "draws": Draws(),
        "looks": looks,
    }
    manager = PluginManager()
    for name, plugin in plugins.items():
        manager.register(plugin, name=name)
    profile = PROFILE | {"training": training, "evaluation": evaluation, "data": data}
    profile["plugins"] = ["report"]
    trainer = Trainer(boot(profile, manager=manager), output=run)
    # Later collections skip the objects that exist already.
    gc.collect()
    gc.freeze()
    trainer.fit()
    return trainer, looks


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python benchmarks/soak.py", None, __doc__, formatter_class=raw
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS:,} steps")
    parser.add_argument("--steps", type=int, default=0, help=f"so many ({STEPS:,})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="apt-soak-") as folder:
        os.environ["APT_CACHE"] = str(Path(folder) / "cache")
        trainer, looks = soak(steps, QUICK_LOOKS if options.quick else LOOKS, Path(folder))
        metrics = (trainer.folder.path / "metrics.jsonl").stat().st_size
        log = (trainer.folder.path / "log.txt").stat().st_size
    seconds = time.perf_counter() - began
    rows = judged(looks.seen)
    for row in rows:
        low, high = row["interval"]
        print(
            f"{row['kind']}: {row['first']:,.6g} in the first tenth, {row['last']:,.6g} in the "
            f"last, grows by {row['growth']:,.3g} ({low:,.3g} to {high:,.3g}): "
            f"{next(iter(row['outcomes']))}"
        )
    records = trainer.manager.records
    print(f"{trainer.step:,} steps with {len(records)} plugins in {seconds:.0f} s")
    grown = sum(row["unexpected"] for row in rows)
    if options.json:
        words = sys.argv[1:] if arguments is None else arguments
        content = {
            "tool": "soak",
            "command": command_of("benchmarks/soak.py", words),
            "seed": trainer.config.training.seed,
            "seconds": round(seconds, 1),
            "machine": describe_machine(),
            "versions": versions(),
            "rows": rows,
            "steps": trainer.step,
            "plugins": {name: record.state for name, record in records.items()},
            "failures": {name: len(record.failures) for name, record in records.items()},
            "metrics_bytes_per_step": metrics / trainer.step,
            "log_bytes_per_step": log / trainer.step,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
