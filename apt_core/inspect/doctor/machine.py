"""The machine as the system tells of it: interpreter, GPUs, cores, memory, compiler, terminal."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from apt_core.device import (
    BF16_UNITS,
    DEVICES,
    available_host_memory,
    control_group_cores,
    has_nvidia_gpu,
)
from apt_core.inspect.doctor.checks import BROKEN, NOTE, OK, Check, in_gib
from apt_core.inspect.doctor.packages import torch_build

LOWEST_PYTHON = (3, 11)

NVIDIA = Path("/proc/driver/nvidia")
"""Where NVIDIA's driver tells its version and the GPUs."""

LEAST_DRIVER = {"11": 450, "12": 525, "13": 580}
"""The driver that each major version of CUDA needs on Linux (NVIDIA's release notes of CUDA, the
table of minor version compatibility)."""

LITTLE_MEMORY = 2**30
LITTLE_SHARED_MEMORY = 2**28
"""Containers have 64 MiB by default, which processes of a run that share tensors soon fill."""

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (it is looked at only)


def python() -> Iterator[Check]:
    version = platform.python_version()
    detail = f"{platform.python_implementation()} {version} ({sys.executable or 'unknown path'})"
    if sys.version_info < LOWEST_PYTHON:
        lowest = ".".join(map(str, LOWEST_PYTHON))
        yield Check("Python", BROKEN, f"{detail}: too old", f"install Python {lowest} or newer")
    else:
        yield Check("Python", OK, detail)


def gpus() -> Iterator[Check]:
    """The GPUs that the system shows, and whether this torch is built for them."""
    models = _nvidia_models()
    if not models and not any(DEVICES.glob("nvidia[0-9]*")):
        if (DEVICES / "kfd").exists():
            yield Check(
                "GPU", NOTE, "an AMD GPU: not tested with APT, which takes it as torch does"
            )
        elif sys.platform == "darwin":
            yield Check("GPU", OK, "Apple's, as torch's mps, where this machine has it")
        else:
            yield Check("GPU", OK, "none: runs compute on the CPU")
        return
    driver = _nvidia_driver()
    detail = f"{', '.join(models) or 'an NVIDIA GPU'}, driver {driver or 'unknown'}"
    built = torch_build()
    if not any(DEVICES.glob("nvidia[0-9]*")):
        yield Check(
            "GPU",
            NOTE,
            f"{detail}; not given to this container: runs compute on the CPU",
            "docker run --gpus all",
        )
    elif not has_nvidia_gpu():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        yield Check(
            "GPU",
            NOTE,
            f"{detail}; hidden by CUDA_VISIBLE_DEVICES={hidden!r}: runs compute on the CPU",
            "unset CUDA_VISIBLE_DEVICES",
        )
    elif built is None:
        yield Check("GPU", OK, detail)
    elif not built.cuda:
        yield Check(
            "GPU",
            NOTE,
            f"{detail}; torch {built.version} is a build without CUDA: runs compute on the CPU",
            "install torch's build with CUDA: https://pytorch.org/get-started/locally",
        )
    elif driver and int(driver.partition(".")[0]) < (
        least := LEAST_DRIVER.get(built.cuda.partition(".")[0], 0)
    ):
        yield Check(
            "GPU",
            NOTE,
            f"{detail}; torch is built for CUDA {built.cuda}, which needs "
            f"driver {least}: runs compute on the CPU",
            f"install driver {least} or newer, or a build of torch for an older CUDA",
        )
    else:
        yield Check("GPU", OK, f"{detail}; torch is built for CUDA {built.cuda}")


def _nvidia_models() -> list[str]:
    models = []
    for file in sorted(NVIDIA.glob("gpus/*/information")):
        found = re.search(r"^Model:\s*(.+)$", file.read_text(errors="replace"), re.M)
        models.append(found[1].strip() if found else "an NVIDIA GPU")
    return models


def _nvidia_driver() -> str:
    """The version of NVIDIA's driver; empty where it does not tell."""
    file = NVIDIA / "version"
    text = file.read_text(errors="replace") if file.is_file() else ""
    found = re.search(r"\s(\d{3}\.[\d.]+)\s", text)
    return found[1] if found else ""


def cpu() -> Iterator[Check]:
    """The cores that this process may use, and what is not in step with them."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    model, flags = _cpu_model()
    detail = f"{usable} of {cores} cores" if usable < cores else f"{cores} cores"
    detail += f", {model}" if model else ""
    units = [unit for unit in BF16_UNITS if unit in flags]
    detail += f", bf16 in hardware ({', '.join(units)})" if units else ", no bf16 in hardware"
    asked = os.environ.get("OMP_NUM_THREADS", "")
    detail += f", OMP_NUM_THREADS={asked}" if asked else ""
    limit = control_group_cores()
    if asked and not (asked.isdigit() and int(asked) > 0):
        yield Check("CPU", NOTE, detail, "OMP_NUM_THREADS is no number of threads: unset it")
    elif asked and int(asked) > usable:
        yield Check(
            "CPU",
            NOTE,
            f"{detail}: more threads than cores wait for each other",
            f"OMP_NUM_THREADS={usable}, or hardware.num_threads: {usable}",
        )
    elif limit is not None and limit < usable and not asked:
        few = max(1, int(limit))
        yield Check(
            "CPU",
            NOTE,
            f"{detail}; the control group allows the time of {limit:g}: torch "
            f"starts {usable} threads, which wait for each other",
            f"OMP_NUM_THREADS={few}, or hardware.num_threads: {few}",
        )
    else:
        yield Check("CPU", OK, detail)


def _cpu_model() -> tuple[str, set[str]]:
    """The processor's name and its features, as far as the system tells."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return platform.processor(), set()
    text = file.read_text(errors="replace").partition("\n\n")[0]
    rows = dict(re.findall(r"^(.*?)\s*: (.*)$", text, re.M))
    return rows.get("model name", "").strip(), set(rows.get("flags", "").split())


def memory() -> Iterator[Check]:
    available = available_host_memory()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    detail = f"{in_gib(available)} available of {in_gib(total)}"
    if available < LITTLE_MEMORY:
        yield Check(
            "memory",
            NOTE,
            f"{detail}: little, of which torch alone takes a part",
            "end other programs, or raise the limit of the container",
        )
    else:
        yield Check("memory", OK, detail)


def shared_memory() -> Iterator[Check]:
    if not SHARED_MEMORY.is_dir():
        return
    size = shutil.disk_usage(SHARED_MEMORY).total
    if size < LITTLE_SHARED_MEMORY:
        yield Check(
            "shared memory",
            NOTE,
            f"{in_gib(size)} in {SHARED_MEMORY}: little for several processes on GPUs",
            "docker run --shm-size=1g",
        )
    else:
        yield Check("shared memory", OK, f"{in_gib(size)} in {SHARED_MEMORY}")


def compiler() -> Iterator[Check]:
    """Whether torch.compile finds a C++ compiler."""
    names = [*filter(None, [os.environ.get("CXX", "")]), "g++", "clang++", "c++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found:
        yield Check("compiler", OK, f"{found}, for torch.compile")
    else:
        yield Check(
            "compiler",
            NOTE,
            "no C++ compiler: nothing is compiled on a CPU "
            "(training.compile, apt-generate --compile)",
            "install g++ or clang, or name one in CXX",
        )


def terminal() -> Iterator[Check]:
    """Whether text that is not ASCII can be shown."""
    encoding = getattr(sys.stdout, "encoding", "") or "unknown"
    if encoding.lower().replace("-", "") in ("utf8", "cp65001"):
        yield Check("terminal", OK, f"encoding {encoding}")
    else:
        yield Check(
            "terminal",
            NOTE,
            f"encoding {encoding}: other characters are shown as escapes",
            "LANG=C.UTF-8, or PYTHONUTF8=1",
        )
