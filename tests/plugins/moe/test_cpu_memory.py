"""Gradients of experts get memory that was used before, and never what is in use."""

from __future__ import annotations

import gc

import pytest
import torch

from apt_plugins.moe import cpu_memory
from apt_plugins.moe.cpu_memory import gradient_like


@pytest.fixture(autouse=True)
def every_size_is_kept(monkeypatch):
    monkeypatch.setattr(cpu_memory, "FRESH_BYTES", 0)
    monkeypatch.setattr(cpu_memory, "_free", [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_gradient_has_the_shape_and_type_and_begins_a_page(dtype):
    gradient = gradient_like(torch.empty(3, 5, 7, dtype=dtype))
    assert (gradient.shape, gradient.dtype) == ((3, 5, 7), dtype)
    assert gradient.is_contiguous()
    assert gradient.data_ptr() % cpu_memory.HUGE_PAGE == 0
    gradient.fill_(2.0)
    assert gradient.sum() == 2 * 3 * 5 * 7


def test_memory_is_used_again_when_no_tensor_holds_it():
    weight = torch.empty(64, 64)
    gradient = gradient_like(weight)
    address, view = gradient.data_ptr(), gradient[3]
    del gradient
    assert gradient_like(weight).data_ptr() != address
    view.fill_(1.0)
    del view
    gc.collect()
    assert address in {each.data_ptr() for each in [gradient_like(weight) for _ in range(2)]}


def test_blocks_of_a_size_that_is_not_asked_for_any_more_are_returned():
    gradient_like(torch.empty(64, 64))
    assert len(cpu_memory._free) == 1
    kept = gradient_like(torch.empty(128, 64))
    assert cpu_memory._free == []
    del kept
    assert [len(block) for block in cpu_memory._free] == [128 * 64 * 4 + cpu_memory.HUGE_PAGE]


def test_where_the_system_refuses_torch_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(cpu_memory, "_take", lambda size: (_ for _ in ()).throw(OSError(12, "no")))
    assert gradient_like(torch.empty(4, 4)).shape == (4, 4)
