"""Copies for a checkpoint, with the way from a GPU taken on the CPU."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from apt_core.runs.checkpoint import list_checkpoints
from apt_core.testing import tiny_run
from apt_core.training import host_copies
from apt_core.training.host_copies import HostCopies


class Device:
    """Stands in for a GPU: what was pinned, in bytes, and how often it was waited for."""

    def __init__(self, room=2**40):
        self.pinned, self.waits, self.room = [], 0, room

    def pin(self, size):
        if sum(self.pinned) + size > self.room:
            raise RuntimeError("out of memory")
        self.pinned.append(size)
        return torch.empty(size, dtype=torch.uint8)

    def wait_for(self, device):
        self.waits += 1


@pytest.fixture
def gpu(monkeypatch):
    device = Device()
    monkeypatch.setattr(host_copies, "is_sent", lambda part: True)
    monkeypatch.setattr(host_copies, "pinned", device.pin)
    monkeypatch.setattr(host_copies, "wait_for", device.wait_for)
    return device


def groups():
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(5, 7, generator=generator)
    return {
        "model": {"a": square, "turned": square.T, "flag": torch.tensor(True), "none": square[:0]},
        "optimizer": {"step": torch.tensor(3.0), "half": square.bfloat16(), "int": square.long()},
    }


def same(copies, given):
    flat = [
        (copies[group][name], tensor) for group in given for name, tensor in given[group].items()
    ]
    assert all(torch.equal(a, b) and a.dtype == b.dtype and a.is_contiguous() for a, b in flat)
    return [copy for copy, _ in flat]


def test_all_tensors_are_waited_for_together_and_memory_is_kept(gpu, tmp_path):
    copies, given = HostCopies(), groups()
    for times in (1, 2):
        made = copies.of(given)
        assert gpu.waits == times
        parts = same(made, given)
        assert len(gpu.pinned) == 1
        assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    for name, group in made.items():
        save_file(group, tmp_path / name)
        assert load_file(tmp_path / name).keys() == group.keys()
        same({name: load_file(tmp_path / name)}, {name: given[name]})
    given["model"]["a"].zero_()
    assert made["model"]["a"].abs().max() > 0


def test_a_large_tensor_has_a_block_of_its_own_and_more_is_taken_as_needed(gpu, monkeypatch):
    monkeypatch.setattr(host_copies, "BLOCK_BYTES", 1024)
    copies = HostCopies()
    given = {"model": {"large": torch.ones(3000), **{str(i): torch.ones(200) for i in range(4)}}}
    same(copies.of(given), given)
    assert gpu.pinned == [16384]
    given["model"] |= {f"new {i}": torch.ones(200) for i in range(3)}
    same(copies.of(given), given)
    assert gpu.pinned == [16384, 1024, 1024]


@pytest.mark.parametrize("what", ["a quarter of the host's", "what the driver gives"])
def test_more_than_may_be_pinned_is_copied_to_ordinary_memory(gpu, what, monkeypatch):
    driver = what == "what the driver gives"
    gpu.room = 2048 if driver else gpu.room
    available = 2**40 if driver else 4 * 2 * 2048
    monkeypatch.setattr(host_copies, "available_memory", lambda device: available)
    monkeypatch.setattr(host_copies, "BLOCK_BYTES", 1024)
    given = {"model": {str(i): torch.full((200,), float(i)) for i in range(5)}}
    copies = HostCopies(processes=1 if driver else 2)
    for _ in range(2):
        same(copies.of(given), given)
    assert gpu.pinned == [1024, 1024] and gpu.waits == 2


def test_a_run_saves_the_same_and_waits_once_for_each_checkpoint(gpu, tmp_path):
    overrides = {"training.save_every_steps": 2, "training.ema_decay": 0.5}
    tiny_run(steps=6, overrides=overrides, output=tmp_path / "sent")
    assert gpu.waits == 3
    gpu.waits = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_copies, "is_sent", lambda part: False)
        tiny_run(steps=6, overrides=overrides, output=tmp_path / "copied")
    assert gpu.waits == 0
    for file in ("model", "optimizer", "ema"):
        one, other = (
            load_file(list_checkpoints(tmp_path / name / "checkpoints")[-1] / f"{file}.safetensors")
            for name in ("sent", "copied")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
