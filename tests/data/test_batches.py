from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt_core.data import IGNORED, BatchPlan, EvaluationPlan
from apt_core.data.sampler import epoch_order
from apt_core.errors import ConfigError


def plan_of(count=1000, **sizes):
    sizes = {"seq_len": 7, "batch_size": 3, "grad_accum_steps": 2, "seed": 1, **sizes}
    return BatchPlan(np.arange(count, dtype=np.uint32), **sizes)


def steps(plan, epoch):
    return [plan.step_batches(epoch, index) for index in range(plan.steps_per_epoch)]


def check_targets(batches, count):
    """Every token but the first once, each after the token before it; padding is not counted."""
    seen = Counter()
    for batch in batches:
        counted = batch.targets != IGNORED
        assert batch.num_targets == counted.sum()
        assert torch.equal(batch.input_ids[counted] + 1, batch.targets[counted])
        assert batch.input_ids.min() >= 0
        seen.update(batch.targets[counted].tolist())
    assert seen == Counter(range(1, count))


@given(
    count=st.integers(40, 400),
    seq_len=st.integers(1, 12),
    batch_size=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    epoch=st.integers(1, 5),
)
def test_every_token_is_predicted_once_an_epoch(count, seq_len, batch_size, accumulate, epoch):
    if (count - 1) // seq_len < batch_size * accumulate:
        return
    plan = plan_of(count, seq_len=seq_len, batch_size=batch_size, grad_accum_steps=accumulate)
    batches = [batch for step in steps(plan, epoch) for batch in step]
    check_targets(batches, count)
    assert sum(batch.num_targets for batch in batches) == plan.targets_per_epoch


@given(count=st.integers(2, 300), seq_len=st.integers(1, 12), batch_size=st.integers(1, 5))
def test_evaluation_sees_every_token_once_and_in_order(count, seq_len, batch_size):
    tokens = np.arange(count, dtype=np.uint32)
    plan = EvaluationPlan(tokens, seq_len=seq_len, batch_size=batch_size)
    batches = [plan.batch(index) for index in range(plan.num_batches)]
    check_targets(batches, count)
    order = [t for batch in batches for t in batch.targets.flatten().tolist() if t != IGNORED]
    assert order == sorted(order)


def test_a_bounded_evaluation_is_spread_over_the_text():
    tokens = np.arange(1000, dtype=np.uint32)
    plan = EvaluationPlan(tokens, seq_len=5, batch_size=2)
    stretches = plan.stretches(4, 2)
    batches = [plan.batch(index) for windows in stretches for index in plan.batches_of(windows)]
    assert len(batches) == 4
    assert [batch.input_ids[0, 0].item() for batch in batches] == [0, 250, 500, 750]


@given(count=st.integers(2, 200), limit=st.integers(1, 9))
def test_how_a_stretch_is_cut_into_batches_changes_nothing(count, limit):
    tokens = np.arange(count, dtype=np.uint32)

    def seen(batch_size: int) -> list[int]:
        plan = EvaluationPlan(tokens, seq_len=3, batch_size=batch_size)
        batches = [plan.batch(i) for w in plan.stretches(limit, 12) for i in plan.batches_of(w)]
        return [t for batch in batches for t in batch.targets.flatten().tolist()]

    assert seen(1) == seen(2) == seen(4) == seen(12)


def test_steps_have_the_sizes_of_the_profile_and_the_last_is_short():
    plan = plan_of(7 * 20 + 1)
    shapes = [[tuple(batch.input_ids.shape) for batch in step] for step in steps(plan, 1)]
    assert shapes[0] == [(3, 7), (3, 7)]
    assert shapes[-1] == [(2, 7)]
    assert plan.steps_per_epoch == 4


def test_the_order_is_a_function_of_seed_epoch_and_index_alone():
    def order(plan, epoch):
        return [batch.input_ids[:, 0].tolist() for step in steps(plan, epoch) for batch in step]

    expected = order(plan_of(), 2)
    epoch_order.cache_clear()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    later = plan_of()
    assert later.step_batches(2, 5)[0].input_ids[:, 0].tolist() == expected[10]
    assert order(later, 2) == expected
    assert order(plan_of(), 1) != expected
    assert order(plan_of(seed=2), 2) != expected


def test_the_order_draws_from_no_global_generator():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    epoch_order.cache_clear()
    steps(plan_of(), 1)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after


def test_the_order_is_the_same_on_every_machine():
    assert epoch_order(0, 1, 8).tolist() == [7, 4, 5, 1, 6, 2, 0, 3]


def test_tokens_may_be_memory_mapped(tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, np.arange(1000, dtype=np.uint16))
    mapped = BatchPlan(np.load(path, mmap_mode="r"), seq_len=7, batch_size=3, seed=1)
    plain = plan_of(grad_accum_steps=1)
    ours, theirs = mapped.step_batches(1, 3)[0], plain.step_batches(1, 3)[0]
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert ours.input_ids.dtype == torch.int64


def test_a_batch_moves_as_a_whole():
    moved = plan_of().step_batches(1, 0)[0].to("meta")
    assert moved.input_ids.is_meta
    assert moved.targets.is_meta
    assert moved.num_targets == 21


def test_text_that_does_not_fill_a_step_is_bad_input():
    with pytest.raises(ConfigError, match=r"40 tokens.* 6 windows of 7.* takes 8.*grad_accum"):
        plan_of(40, batch_size=4)


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_validate_on_is_bad_input_at_once(count):
    with pytest.raises(ConfigError, match=r"data\.val_path.*nothing can be predicted"):
        EvaluationPlan(np.arange(count, dtype=np.uint8), seq_len=7, batch_size=1)


def test_a_step_that_is_not_there_is_an_error():
    plan = plan_of()
    with pytest.raises(IndexError):
        plan.step_batches(1, plan.steps_per_epoch)


@given(
    count=st.integers(2, 400),
    seq_len=st.integers(1, 9),
    batch_size=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    world_size=st.integers(1, 4),
)
def test_processes_share_out_the_steps_of_one(count, seq_len, batch_size, accumulate, world_size):
    if (count - 1) // seq_len < batch_size * accumulate * world_size:
        return
    sizes = {"seq_len": seq_len, "batch_size": batch_size}
    alone = plan_of(count, grad_accum_steps=accumulate * world_size, **sizes)
    ranks = [
        plan_of(count, grad_accum_steps=accumulate, rank=rank, world_size=world_size, **sizes)
        for rank in range(world_size)
    ]
    assert {plan.steps_per_epoch for plan in ranks} == {alone.steps_per_epoch}
    for index in range(alone.steps_per_epoch):
        shares = [plan.step_batches(1, index) for plan in ranks]
        assert len({len(share) for share in shares}) == 1
        dealt = [batch for turn in zip(*shares, strict=True) for batch in turn if batch.num_targets]
        whole = alone.step_batches(1, index)
        assert [b.input_ids.tolist() for b in dealt] == [b.input_ids.tolist() for b in whole]
        assert sum(b.num_targets for b in whole) == ranks[-1].step_targets(1, index)


@given(count=st.integers(9, 300), seq_len=st.integers(1, 9), epoch=st.integers(1, 3))
def test_targets_before_a_step_are_those_of_the_steps_before(count, seq_len, epoch):
    if (count - 1) // seq_len < 2:
        return
    plan = plan_of(count, seq_len=seq_len, batch_size=2, grad_accum_steps=1)
    for index in range(plan.steps_per_epoch + 1):
        counted = sum(plan.step_targets(epoch, step) for step in range(index))
        assert plan.targets_before(epoch, index) == counted
