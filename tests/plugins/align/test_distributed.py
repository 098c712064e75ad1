"""Two processes align as one does. All their runs happen in one start of torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apt_core.testing import TINY_PROFILE
from apt_core.testing.tiny import TEXT
from apt_core.training import Trainer

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[3]
WORKER = """
import json, sys
import torch.distributed as dist
from apt_core.training import Trainer

dist.init_process_group("gloo")
for profile, options in json.load(open(sys.argv[1])):
    Trainer(profile, strict=True, **options).fit()
    dist.barrier()
dist.destroy_process_group()
"""
SHARDINGS = {"ddp": True, "fsdp": "fsdp"}
HALF = 4


def profile_of(folder, accumulation, bistate, dropout=0.0, distributed=False):
    model = {**TINY_PROFILE["model"], "tva": {"s": 1}, "dropout": dropout, "bistate": bistate}
    training = {
        **TINY_PROFILE["training"],
        "log_every_steps": 1,
        "max_steps": 8,
        "seed": 1,
        "grad_accum_steps": accumulation,
    }
    hardware = {**TINY_PROFILE["hardware"], "num_threads": 1, "distributed": distributed}
    # The last step of an epoch, the sixth, has too few windows for the second process.
    text = folder / "text.txt"
    text.write_text(TEXT[:750], encoding="utf-8")
    return {
        **TINY_PROFILE,
        "plugins": ["apt_plugins.align.plugin"],
        "model": model,
        "training": training,
        "hardware": hardware,
        "data": {"train_path": str(text)},
        "schedules": {"enable_align_at_step": 3},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, forks):
    folder = tmp_path_factory.mktemp("align")
    ema, rdrop = {"momentum_start": 0.5}, {"mode": "rdrop"}
    # A process draws for itself: only where next to nothing is dropped, two are as one.
    dropout = 1e-12
    Trainer(profile_of(folder, 2, ema), output=folder / "alone", strict=True).fit()
    passes = profile_of(folder, 2, rdrop, dropout)
    Trainer(passes, output=folder / "alone_rdrop", strict=True).fit()
    passes = profile_of(folder, 1, rdrop, dropout, distributed=True)
    jobs = [(passes, {"output": str(folder / "ddp_rdrop")})]
    for name, distributed in SHARDINGS.items():
        whole = profile_of(folder, 1, ema, distributed=distributed)
        parts = str(folder / f"{name}_parts")
        jobs += [
            (whole, {"output": str(folder / name)}),
            (whole, {"output": parts, "stop_at_step": HALF}),
            (whole, {"output": parts, "resume": True}),
        ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "worker.py").write_text(WORKER)
    with forks():
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             str(folder / "worker.py"), str(folder / "jobs.json")],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def figures(folder, name):
    """Losses and gradient norms, step by step."""
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "grad_norm" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert "loss/align.kl" in rows[-1]
    return [row[key] for row in rows for key in ("loss", "grad_norm")]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_processes_align_as_one_does(folder, sharding):
    assert figures(folder, sharding) == pytest.approx(figures(folder, "alone"), rel=1e-5)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_processes_go_on_with_their_teacher(folder, sharding):
    assert figures(folder, f"{sharding}_parts") == figures(folder, sharding)


def test_two_passes_give_the_gradients_of_both_in_two_processes(folder):
    expected = figures(folder, "alone_rdrop")
    assert figures(folder, "ddp_rdrop") == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(figures(folder, "alone"), rel=1e-3)
