"""Devices: which one a run uses and why, its precision, its memory. torch is imported on use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from apt_core.error_text import cause_of

if TYPE_CHECKING:
    import torch


def resolve_device(asked: str) -> tuple[torch.device, str]:
    """The device for ``hardware.device`` (auto, cpu, cuda, cuda:N, mps), and why it is another one.

    The reason is empty when the device is the one asked for. ``auto`` takes an accelerator where
    there is one. A CUDA device has an index: torch treats ``cuda`` and ``cuda:0`` as different.
    """
    import torch

    kind, _, index = asked.partition(":")
    # A run on the CPU does not query CUDA, which could keep a forked child from using it.
    if kind in ("auto", "cuda") and torch.cuda.is_available():
        if not index:
            index = str(torch.cuda.current_device() if torch.cuda.is_initialized() else 0)
        if int(index) < torch.cuda.device_count():
            return torch.device("cuda", int(index)), ""
    if kind in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps"), ""
    if kind in ("auto", "cpu"):
        return torch.device("cpu"), ""
    why = reason_gpu_unused() if kind == "cuda" else ""
    return torch.device("cpu"), why or f"this machine or this build of torch has no {asked} device"


DEVICES = Path("/dev")


def has_nvidia_gpu() -> bool:
    """Whether this machine has a visible NVIDIA GPU, usable by torch or not."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    return not hidden and any(DEVICES.glob("nvidia[0-9]*"))


def reason_gpu_unused() -> str:
    """Why torch cannot use this machine's GPU; empty if it can, or if there is none."""
    import torch

    if torch.cuda.is_available() or not has_nvidia_gpu():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return f"torch is built for CUDA {torch.version.cuda}, which finds no GPU: too old a driver?"


def gpu_name(device: torch.device) -> str:
    """The product name of the GPU ``device``; empty for another device."""
    import torch

    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else ""


def as_current_device(device: torch.device) -> AbstractContextManager[object]:
    """A context that makes ``device`` the current CUDA device, if it is a GPU."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


BF16_UNITS = ("avx512_bf16", "amx_bf16")
"""Instruction sets of x86 CPUs with bf16 products."""

BF16_CPU_WIDTH = 256
"""The smallest d_model at which bf16 speeds up a step on a CPU with such units.

Measured on Zen 4, against fp32: 0.85 to 0.5 of the time from here on, the same time at 128, and a
fifth more at 64, where the casts cost more than the products save."""


def autocast_dtype(
    mixed_precision: bool | str, device: torch.device, d_model: int = 0
) -> torch.dtype | None:
    """The autocast type for ``training.mixed_precision``, or None for plain fp32.

    ``auto`` uses bf16 where the hardware is faster in it: on CUDA with native bf16, and on a CPU
    with bf16 units for models of ``d_model`` >= BF16_CPU_WIDTH. Other CPUs emulate bf16, which
    makes a step slower.
    """
    import torch

    if mixed_precision != "auto":
        return torch.bfloat16 if mixed_precision else None
    if device.type == "cpu":
        units = torch.cpu.get_capabilities()
        faster = d_model >= BF16_CPU_WIDTH and any(units.get(unit) for unit in BF16_UNITS)
    else:
        faster = has_native_bf16(device)
    return torch.bfloat16 if faster else None


PLANNED_CAPABILITY = (9, 0)
"""The compute capability, an H100's, that a plan assumes on a machine without a GPU."""


def has_native_bf16(device: torch.device) -> bool:
    """Whether ``device`` is a GPU with bf16 products in hardware; a GPU that a plan assumes on a
    machine without one counts as such."""
    import torch

    if device.type != "cuda":
        return False
    if not torch.cuda.is_available():
        return True
    with as_current_device(device):  # torch asks the current device
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def planned_capability() -> tuple[int, int]:
    """The compute capability that a plan for a GPU uses: that of the current GPU, else
    :data:`PLANNED_CAPABILITY`."""
    import torch

    if not torch.cuda.is_available():
        return PLANNED_CAPABILITY
    major, minor = torch.cuda.get_device_capability()
    return major, minor


def stands_for_gpu(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a fake on the CPU of one on a GPU, made to count memory."""
    return bool(tensor.is_cuda) and tensor.device.type != "cuda"


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """An autocast context for a forward in ``dtype``; None is fp32."""
    import torch

    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has finished all work."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """On a GPU, restart the count of :func:`peak_memory_bytes`; elsewhere do nothing."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The peak of memory in bytes: of tensors on a GPU, of the whole process on a CPU."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


THREADS_RESERVE = 208 * 2**20
"""Address space for the two threads that a run starts, for the backward pass and for writing
checkpoints: a heap of 64 MiB and a stack of 8 MiB each, and briefly a second heap."""


def available_memory(device: torch.device) -> int:
    """The bytes that this process may use on ``device``, including those that it uses already.

    On a GPU: its free memory, at most the process's share of the whole. On a CPU: the least of the
    system's free memory, the limits of the process's control groups, and the limit of its address
    space (``ulimit -v``) less what is reserved without being used.
    """
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        share = torch.cuda.get_per_process_memory_fraction(device)
        return int(min(free + torch.cuda.memory_reserved(device), share * total))
    return available_host_memory()


def available_host_memory() -> int:
    """The bytes that this process may use on a CPU (:func:`available_memory`), without torch."""
    reserved, held = _own_memory()
    if not held:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    import resource

    lines = Path("/proc/meminfo").read_text().splitlines()
    left = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    limits = [left * 1024 + held, *_control_group_limits()]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space - reserved + held - THREADS_RESERVE)
    return max(0, min(limits))


def held_memory(device: torch.device) -> int:
    """The bytes of :func:`available_memory` that this process uses already: on a GPU those of its
    tensors, on a CPU its resident memory, libraries included."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _own_memory()[1]


def _own_memory() -> tuple[int, int]:
    """The bytes of address space that the process has reserved, and of memory that it holds; 0
    where the system does not tell."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return 0, 0
    reserved, held = map(int, pages.read_text().split()[:2])
    return reserved * os.sysconf("SC_PAGE_SIZE"), held * os.sysconf("SC_PAGE_SIZE")


def _control_group_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """The memory limits in bytes of the process's control group and its parents (v1 and v2)."""
    files = {"": "memory.max", "memory": "memory.limit_in_bytes"}
    for _, text in _control_group_files(files, root, membership):
        if text != "max":
            yield int(text)


def control_group_cores(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float | None:
    """How many cores' time the process's control group and its parents allow (v1 and v2); None
    without a limit."""
    files = {"": "cpu.max", "cpu": "cpu.cfs_quota_us"}
    shares = []
    for file, text in _control_group_files(files, root, membership):
        quota, _, period = text.partition(" ")
        period = period or file.with_name("cpu.cfs_period_us").read_text()
        if quota != "max" and int(quota) > 0:
            shares.append(int(quota) / int(period))
    return min(shares, default=None)


def _control_group_files(
    files: Mapping[str, str], root: Path, membership: Path
) -> Iterator[tuple[Path, str]]:
    """The files of the process's control group and its parents, with their text. ``files`` are
    their names by controller; that of version 2 is empty."""
    if not membership.exists():
        return
    for line in membership.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        controller = next((c for c in controllers.split(",") if c in files), None)
        if controller is None:
            continue
        top = root / controller if controller else root
        own = top / name.lstrip("/")
        for folder in (own, *own.parents):
            file = folder / files[controller]
            if file.exists():
                yield file, file.read_text().strip()
            if folder == top:
                break


OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory",
                 "ALLOC_FAILED")  # fmt: skip
"""Texts of RuntimeErrors for a lack of memory: few allocators have an exception of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or an error that caused it, is due to a lack of memory."""
    import torch

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(cause, RuntimeError) and any(text in str(cause) for text in OUT_OF_MEMORY):
            return True
        cause = cause_of(cause)
    return False


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """A context in which torch computes with ``count`` threads; None changes nothing."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
