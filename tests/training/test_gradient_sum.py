"""What brings gradients together, in a group of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from apt_core.errors import ProcessLostError, TrainingError
from apt_core.parallel import gradient_sum
from apt_core.parallel.gradient_sum import GradientSum
from apt_core.parallel.world import World


@pytest.fixture
def world(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield World(sharding="ddp")
    dist.destroy_process_group()


def test_gradients_of_many_messages_and_of_two_types_are_what_they_were(world, monkeypatch):
    monkeypatch.setattr(gradient_sum, "BUCKET_BYTES", 64)
    sent = []
    reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda t, **how: (sent.append(t), reduce(t, **how)))
    model = nn.ModuleDict({f"layer {n}": nn.Linear(3, 5) for n in range(4)})
    model["wide"], model["never"] = nn.Linear(5, 5).double(), nn.Linear(2, 2)
    model["layer 0"].requires_grad_(False)
    together = GradientSum(model, world)
    for _ in range(2):
        expected = {}
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if parameter.requires_grad and not name.startswith("never"):
                parameter.grad = torch.randn_like(parameter)
                if parameter.ndim == 2:  # not contiguous, as of a product with a transpose
                    parameter.grad = parameter.grad.T.contiguous().T
                expected[name] = parameter.grad.clone()
        sent.clear()
        together.begin()
        loss, stopping = together.finish(1, torch.tensor(2.0), stop=True)
        assert (loss, stopping) == (2.0, 1.0)
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert {t.dtype for t in sent} == {torch.float32, torch.float64} and len(sent) > 4
        # Thawed between two steps.
        model["layer 0"].requires_grad_(True)


def test_a_gradient_that_is_not_dense_is_named(world):
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True))
    together = GradientSum(model, world)
    together.begin()
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(TrainingError, match=r"the gradient of 0\.weight is torch\.sparse_coo"):
        together.finish(1, torch.tensor(0.0), stop=False)


class Work:
    """A collective of Gloo with a machine that has been switched off, or with one that is slow."""

    def __init__(self, waits: int, error: str = "") -> None:
        self.waits, self.error = waits, error

    def wait(self, timeout: object = None) -> None:
        self.waits -= 1
        if self.waits > 0:
            raise RuntimeError("Operation timed out!")
        if self.error:
            raise RuntimeError(self.error)

    def is_completed(self) -> bool:
        return self.waits <= 1  # ended since the last wait


@pytest.mark.parametrize("error", ["", "Connection reset"])
def test_what_is_slow_is_waited_for_and_what_is_lost_is_not(monkeypatch, error):
    world = World(sharding="ddp")
    slow = Work(3, error)
    if error:
        with pytest.raises(RuntimeError, match=error):
            world.wait(slow)
    else:
        world.wait(slow)
    assert slow.waits == 0
    never = Work(10**9)
    waits = never.wait
    told: list[object] = []

    def lost(timeout: object = None) -> None:
        told.append(timeout)
        if len(told) == 3:
            monkeypatch.setattr(world.liveness, "lost", "process 1 has not answered")
        waits(timeout)

    never.wait = lost
    with pytest.raises(ProcessLostError, match="process 1 has not answered"):
        world.wait(never)
    assert len(told) == 3
