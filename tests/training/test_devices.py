"""Which GPU a process takes, on machines that are made up, and that a CPU run leaves GPUs alone."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from apt_core import device
from apt_core.data.batches import Batch
from apt_core.device import as_current_device, has_native_bf16, resolve_device
from apt_core.errors import ConfigError
from apt_core.modeling.init import construction_rng
from apt_core.modeling.placement import settle_device
from apt_core.parallel.world import ALONE, World
from apt_core.runs import manifest
from apt_core.testing import tiny_run
from apt_core.training import opening, prepare
from apt_core.training.saving import writer_thread


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``gpus(count)`` makes a machine with so many; ``current`` is the one in use, if any is."""

    def machine(count: int, current: int | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: current is not None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)

    return machine


def settled(asked: str, world: World = ALONE, *, strict: bool = False) -> tuple[str, list[str]]:
    kernel: Any = SimpleNamespace(
        config=SimpleNamespace(hardware=SimpleNamespace(device=asked), model=None),
        manager=SimpleNamespace(strict=strict),
        registry=SimpleNamespace(),
        notices=[],
    )
    return str(settle_device(kernel, world)), kernel.notices


def test_a_gpu_is_named_by_its_index(gpus: Any) -> None:
    gpus(2)
    assert [str(resolve_device(asked)[0]) for asked in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda:0", "cuda:0", "cuda:1", "cpu"
    ]  # fmt: skip
    gpus(2, current=1)
    assert [str(resolve_device(asked)[0]) for asked in ("auto", "cuda", "cuda:0")] == [
        "cuda:1", "cuda:1", "cuda:0"
    ]  # fmt: skip


def test_each_process_takes_its_own_gpu_and_too_few_are_an_error(gpus: Any) -> None:
    def world(local_rank: int, here: int = 2) -> World:
        return World(rank=local_rank, size=4, local_rank=local_rank, on_this_machine=here)

    gpus(2)
    assert [settled(asked, world(1))[0] for asked in ("auto", "cuda")] == ["cuda:1", "cuda:1"]
    assert settled("cpu", world(1)) == ("cpu", [])
    assert settled("cuda:1", world(0, here=1)) == ("cuda:1", [])
    for local_rank in (0, 1):  # all of them raise it: none waits for another
        with pytest.raises(ConfigError, match=r"cuda:1 is one GPU, and 2 processes"):
            settled("cuda:1", world(local_rank))
    gpus(1)
    for local_rank in (0, 1):
        for asked in ("auto", "cuda"):
            with pytest.raises(ConfigError, match=r"2 processes .* it has 1\b.*--nproc 1 takes"):
                settled(asked, world(local_rank))
    with pytest.raises(ConfigError, match=r"4 processes .* a GPU of their own need LOCAL_RANK=0"):
        settled("cuda", world(3, here=1))
    gpus(0)
    device, (notice,) = settled("cuda", world(1))
    assert device == "cpu" and "cuda not usable" in notice
    assert settled("auto", world(1)) == ("cpu", [])


@pytest.mark.parametrize(
    ("cuda", "said"),
    [(None, "is a build without CUDA"), ("13.0", "CUDA 13.0, .* too old a driver")],
)
def test_a_gpu_that_torch_cannot_use_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: Any, cuda: str | None, said: str
) -> None:
    monkeypatch.setattr(device, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus(0)
    assert settled("auto") == ("cpu", [])
    (tmp_path / "nvidiactl").touch()  # of a driver whose GPUs are given to others
    assert settled("auto") == ("cpu", [])
    (tmp_path / "nvidia0").touch()
    for asked in ("auto", "cuda"):
        taken, (notice,) = settled(asked)
        assert taken == "cpu" and re.search(said, notice)
    assert settled("cpu") == ("cpu", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert settled("auto") == ("cpu", [])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    gpus(1)
    assert settled("auto") == ("cuda:0", [])


def test_a_gpu_is_told_by_what_it_is_called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert device.gpu_name(torch.device("cpu")) == ""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda of: f"NVIDIA X ({of})")
    assert device.gpu_name(torch.device("cuda:1")) == "NVIDIA X (cuda:1)"
    for module in (opening, manifest):
        monkeypatch.setattr(module, "gpu_name", lambda of: "NVIDIA X")
    run = tiny_run(steps=1, output=tmp_path / "run")
    assert run.manifest["gpu"] == "NVIDIA X"
    assert " parameters on cpu (NVIDIA X), no plugins" in (tmp_path / "run/log.txt").read_text()


def test_the_memory_of_a_run_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the measurement of the peak takes is more than a small model does."""
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda of: called.append(str(of)))
    device.reset_peak_memory(torch.device("cuda:1"))
    device.reset_peak_memory(torch.device("cpu"))
    assert called == ["cuda:1"]
    monkeypatch.setattr(prepare, "measured_peak_flops", lambda *_: called.append("measured"))
    monkeypatch.setattr(prepare, "reset_peak_memory", lambda of: called.append(f"forgot {of}"))
    tiny_run(steps=1)
    assert called[1:] == ["measured", "forgot cpu"]


def test_a_cpu_run_does_not_ask_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise AssertionError("asking may keep a child from using CUDA")

    monkeypatch.setattr(torch.cuda, "is_available", asked)
    monkeypatch.setattr(torch.cuda, "device_count", asked)
    assert settled("cpu") == ("cpu", [])
    with as_current_device(torch.device("cpu")):
        pass


def test_each_gpu_is_asked_for_its_own_bf16(monkeypatch: pytest.MonkeyPatch, gpus: Any) -> None:
    gpus(0)
    assert has_native_bf16(torch.device("cuda:1"))  # that of a plan, which is not asked
    gpus(2)
    current = [0]

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        before, current[0] = current[0], chosen.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: current[0] == 1)
    devices = ("cpu", "cuda:0", "cuda:1")
    assert [has_native_bf16(torch.device(name)) for name in devices] == [False, False, True]


def test_a_batch_is_pinned_on_its_way_from_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[str] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.device.type)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    with FakeTensorMode():
        for start, asked in (("cpu", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")):
            ids = torch.zeros(2, 3, dtype=torch.int64, device=start)
            moved = Batch(ids, ids, 6).to(asked)
            assert str(moved.input_ids.device) == asked
    assert pinned == ["cpu", "cpu"]


@pytest.mark.parametrize("used_inside", [False, True])
def test_construction_leaves_cuda_that_nobody_uses_alone(
    monkeypatch: pytest.MonkeyPatch, used_inside: bool
) -> None:
    seeds: list[int] = []
    used: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(used))
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    for name in ("get_rng_state_all", "set_rng_state_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("it initialises CUDA"))
    torch.manual_seed(11)
    seeds.clear()
    with construction_rng(3, "a"):
        (inside,) = seeds
        if used_inside:
            used.append(True)
    assert inside != 11 and seeds == [inside, 11]
    assert torch.initial_seed() == 11


def test_construction_restores_the_generators_of_gpus_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state: list[Any] = ["before"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(state))
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda value: state.__setitem__(0, *value))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda value: state.__setitem__(0, value))
    with construction_rng(3, "a"):
        assert isinstance(state[0], int)
    assert state == ["before"]


def test_checkpoints_are_written_with_the_runs_gpu_as_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[tuple[str, str]] = []

    def set_device(device: torch.device) -> None:
        chosen.append((threading.current_thread().name, str(device)))

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    for name in ("cpu", "cuda:1"):
        with writer_thread(torch.device(name)) as thread:
            thread.submit(lambda: None).result()
    assert chosen == [("apt-checkpoint_0", "cuda:1")]
