"""The peak that MFU is a share of: measured on this device, once, without touching a generator."""

from __future__ import annotations

import pytest
import torch

from apt_core.parallel import peak
from apt_core.parallel.peak import measured_peak_flops
from apt_core.testing import tiny_run

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgotten():
    peak._peak.cache_clear()
    yield
    peak._peak.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_measured_without_drawing_a_random_number(dtype) -> None:
    before = torch.get_rng_state()
    flops = measured_peak_flops(CPU, dtype)
    assert 1e6 < flops < 1e18
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_measured_once_for_each_device_type_and_number_of_threads(monkeypatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(peak, "_shortest_product", lambda size, *_: sizes.append(size) or 1.0)
    for _ in range(2):
        assert measured_peak_flops(CPU, torch.float32) == 2 * peak.SMALLEST**3
    assert sizes == [peak.SMALLEST]
    measured_peak_flops(CPU, torch.bfloat16)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    measured_peak_flops(CPU, torch.float32)
    torch.set_num_threads(threads)
    assert len(sizes) == 3
    precision = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    measured_peak_flops(CPU, torch.float32)
    torch.backends.mkldnn.matmul.fp32_precision = precision
    assert len(sizes) == 4


def test_the_products_grow_as_long_as_there_is_time(monkeypatch) -> None:
    """A device of 1 TFLOP/s that is slower in small products."""
    tried: list[int] = []

    def seconds(size: int, *_: object) -> float:
        tried.append(size)
        return 2 * size**3 / 1e12 + 1e-5

    monkeypatch.setattr(peak, "_shortest_product", seconds)
    flops = measured_peak_flops(CPU, torch.float32)
    assert tried == [256, 512, 1024]
    assert flops == 2 * 1024**3 / (2 * 1024**3 / 1e12 + 1e-5)
    tried.clear()
    peak._peak.cache_clear()
    monkeypatch.setattr(peak, "_shortest_product", lambda size, *_: tried.append(size) or 1e-9)
    measured_peak_flops(CPU, torch.float32)
    assert tried[-1] == peak.LARGEST


def test_no_share_of_a_peak_above_the_whole_is_told(monkeypatch) -> None:
    for seconds, told in ((1e-9, True), (1e9, False)):
        peak._peak.cache_clear()
        monkeypatch.setattr(peak, "_shortest_product", lambda *_, seconds=seconds: seconds)
        rows = tiny_run(steps=2, overrides={"training.log_every_steps": 1}).metrics
        assert {"mfu" in row for row in rows if "tokens_per_s" in row} == {told}
