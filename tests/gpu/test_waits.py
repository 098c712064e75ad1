"""How often the host waits for a GPU, by torch's own warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from apt_core import GenerationRequest
from apt_core.inference import generate
from apt_core.testing import tiny_session
from apt_core.training.host_copies import HostCopies

pytestmark = pytest.mark.gpu

GPU = "cuda"


@contextmanager
def waits() -> Iterator[list[Any]]:
    """The warnings of what waits inside."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield (found := [])
        finally:
            torch.cuda.set_sync_debug_mode(before)
            found += [warning for warning in told if "synchroniz" in str(warning.message)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_generated_token_waits_once(temperature: float, dtype: torch.dtype | None) -> None:
    changes = {"model.max_seq_len": 64, "hardware.device": GPU}
    session = replace(tiny_session(overrides=changes), dtype=dtype)
    numbers = []
    for tokens in (1, 10, 30):  # the first for what is only set up once
        request = GenerationRequest("The ", max_new_tokens=tokens, temperature=temperature)
        with waits() as found:
            result = generate(session, request)
        assert len(result.token_ids) == tokens
        numbers.append(len(found))
    assert 0 < numbers[2] - numbers[1] <= 20  # fewer where guesses are right


def test_copies_for_a_checkpoint_wait_once() -> None:
    tensors = {str(size): torch.randn(size, 3, device=GPU) for size in range(40)}
    given = {"model": tensors, "optimizer": {"step": torch.tensor(3.0, device=GPU)}}
    copies = HostCopies()
    for _ in range(2):
        with waits() as found:
            made = copies.of(given)
        assert len(found) <= 1
        for group, expected in given.items():
            for name, tensor in expected.items():
                assert torch.equal(made[group][name], tensor.cpu())
                assert made[group][name].is_pinned() or not tensor.numel()
