"""Starting a run in several processes on this machine, as torchrun does."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from apt_core.config import Config
from apt_core.training.distributed import POLL_SECONDS, shared_store

SHUTDOWN_SECONDS = 600
"""How long processes that were told to stop may take to save."""

FIRST_SECONDS = 1.0
"""How long a process waits for the first one to have the same to say."""


def processes_for(config: Config) -> tuple[int, str]:
    """How many processes a distributed profile gets on this machine: one a GPU; and why they are
    fewer than ``hardware.num_gpus``, if they are."""
    hardware = config.hardware
    there = torch.cuda.device_count() if hardware.device != "cpu" else 0
    if there >= hardware.num_gpus:
        return hardware.num_gpus, ""
    processes = max(1, there)
    return processes, (
        f"hardware.num_gpus: {hardware.num_gpus} asked, {there} usable here: {processes} "
        "process(es); --nproc N starts N, on CPUs too"
    )


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run ``apt-train ARGUMENTS`` in so many processes; returns the exit code of the one that
    failed first, or 0."""
    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ.setdefault("TORCHELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    # The processes speak for themselves.
    for module in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="apt",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "apt_core", "train", *arguments)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode < 0:
            print(f"error: process {rank} was killed by signal {-first.exitcode}", file=sys.stderr)
            return 1
        return int(first.exitcode)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


def is_said(text: str, rank: int) -> bool:
    """Has another process of the run said ``text`` already, or the first one within a moment?

    They share what torchrun's agent keeps, which outlives them; without one, all speak.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    key = f"apt/said/{hashlib.sha256(text.encode('utf-8', errors='replace')).hexdigest()}"
    try:
        store = shared_store()
        until = time.monotonic() + (FIRST_SECONDS if rank else 0.0)
        while time.monotonic() < until and not store.check([key]):
            time.sleep(POLL_SECONDS)
        return bool(store.add(key, 1) > 1)
    except dist.DistError:
        return False
