"""What holds for every test: property tests draw the same examples in every run, and signals are
heard as in a terminal."""

from __future__ import annotations

import signal

import pytest
from hypothesis import settings

# Broken on purpose: importing them, as the collector of doctests does, would end pytest.
collect_ignore = ["distributions/data"]

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

# A job in the background of a shell ignores SIGINT, one under nohup SIGHUP, and so would its runs.
for number, default in [
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
]:
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what computes on a GPU where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
