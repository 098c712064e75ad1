"""What a step sees is a pure function of its number: for any packing, number of processes and of
workers, after a restart at any point."""

from __future__ import annotations

import os
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_core.data.batches import Batch, BatchPlan, EvaluationPlan, cut_windows
from apt_core.data.order import Order, Segment, StepPlan
from apt_core.data.packing.concat import ConcatWindows
from apt_core.data.packing.pieces import (
    FILES,
    PieceIndex,
    PieceWindows,
    pack_documents,
    pad_documents,
)
from apt_core.data.packing.rows import IGNORED, Windows
from apt_core.data.store.format import DamagedStoreError
from apt_core.data.store.parts import ArrayPart
from apt_core.providers import Encoded

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def concat(count: int, seq_len: int = 7) -> ConcatWindows:
    """The tokens 0..count-1, so that each token names its place."""
    return ConcatWindows(ArrayPart(np.arange(count, dtype=np.uint32)), seq_len)


def documents(lengths: list[int], *, prompts: bool = False) -> ArrayPart:
    """Documents of these lengths; with ``prompts``, the first third of each is not learned."""
    begin, found = 0, []
    for length in lengths:
        ids = np.arange(begin, begin + length, dtype=np.uint32)
        learned = np.arange(length) >= max(1, length // 3) if prompts else None
        found.append(Encoded(ids, learned))
        begin += length
    return ArrayPart.of(found)


def packed(part: ArrayPart, seq_len: int) -> PieceWindows:
    return PieceWindows(part, seq_len, PieceIndex.of(pack_documents(part, seq_len)), packed=True)


def padded(part: ArrayPart, seq_len: int, *, truncation: bool = False) -> PieceWindows:
    index = PieceIndex.of(pad_documents(part, seq_len, truncation=truncation))
    return PieceWindows(part, seq_len, index, packed=False, pad=0)


def plan_of(
    *sources: Windows, batch_size: int = 3, accumulate: int = 2, seed: int = 1, **more: object
) -> BatchPlan:
    world_size = int(str(more.get("world_size", 1)))
    names = [str(number) for number in range(len(sources))]
    sizes = [len(source) for source in sources]
    steps = StepPlan(
        sum(sizes),
        seq_len=sources[0].seq_len,
        windows_per_step=batch_size * accumulate * world_size,
    )
    weights = tuple(float(1 + number) for number in range(len(sources)))
    segments = [Segment(1, weights), Segment(4, weights[::-1])]
    segments += [Segment(6 + i, (1.0, *weights[1:-1], i / 10)) for i in range(20)]
    order = Order(names, sizes, steps, seed=seed, segments=segments if len(sources) > 1 else ())
    return BatchPlan(order, sources, batch_size=batch_size, **more)  # type: ignore[arg-type]


def every(plan: BatchPlan, epoch: int) -> list[list[Batch]]:
    return [plan.step(epoch, index).batches for index in range(plan.steps_per_epoch)]


def content(batch: Batch) -> list[object]:
    tensors = batch.input_ids, batch.targets, batch.document_ids, batch.is_token
    return [*(None if t is None else t.tolist() for t in tensors), batch.num_targets]


def check_targets(batches: list[Batch], expected: set[int]) -> None:
    """Each expected token once, each after the token before it; padding is not counted."""
    seen: Counter[int] = Counter()
    for batch in batches:
        counted = batch.targets != IGNORED
        assert batch.num_targets == counted.sum()
        assert torch.equal(batch.input_ids[counted] + 1, batch.targets[counted])
        seen.update(batch.targets[counted].tolist())
    assert seen == Counter(expected)


@quick
@given(
    count=st.integers(40, 400),
    seq_len=st.integers(1, 12),
    batch_size=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    epoch=st.integers(1, 5),
)
def test_every_token_is_predicted_once_an_epoch(count, seq_len, batch_size, accumulate, epoch):
    plan = plan_of(concat(count, seq_len), batch_size=batch_size, accumulate=accumulate)
    check_targets([b for step in every(plan, epoch) for b in step], {*range(1, count)})
    assert plan.sources[0].num_tokens == count - 1


@quick
@given(
    lengths=st.lists(st.integers(1, 40), min_size=3, max_size=40),
    seq_len=st.integers(2, 16),
    prompts=st.booleans(),
    pad=st.booleans(),
)
def test_packed_documents_are_predicted_once_and_apart(lengths, seq_len, prompts, pad):
    part = documents(lengths, prompts=prompts)
    windows = padded(part, seq_len) if pad else packed(part, seq_len)
    begins = np.cumsum([0, *lengths])
    expected = {
        int(begin) + place
        for begin, length in zip(begins, lengths, strict=False)
        for place in range(1, length)
        if not prompts or place >= max(1, length // 3)
    }
    if not expected:
        assert len(windows) == 0
        return
    batches = [b for s in every(plan_of(windows, batch_size=2, accumulate=1), 1) for b in s]
    check_targets(batches, expected)
    for batch in batches:
        for row in range(len(batch.input_ids)):
            ids = batch.input_ids[row]
            if batch.document_ids is None:
                tokens = batch.is_token[row] if batch.is_token is not None else ids >= 0
                owners = np.searchsorted(begins, ids[tokens].numpy(), side="right")
                assert len({*owners.tolist()}) <= 1
                continue
            for number in set(batch.document_ids[row].tolist()) - {-1}:
                own = ids[batch.document_ids[row] == number].numpy()
                assert len({*np.searchsorted(begins, own, side="right").tolist()}) == 1
    indices = np.arange(len(windows))
    assert windows.num_targets(indices) == len(expected)
    assert windows.num_tokens == sum(batch.num_tokens or 0 for batch in batches)
    assert {e.document for i in indices for e in windows.extracts(i)} <= {*range(len(lengths))}


def test_best_fit_leaves_little_room():
    lengths = np.random.default_rng(0).integers(2, 200, 3000).tolist()
    windows = packed(documents(lengths), 128)
    assert sum(length - 1 for length in lengths) / (len(windows) * 128) > 0.99


def test_truncation_keeps_the_beginning_of_each_document():
    part = documents([20, 3, 9])
    assert [padded(part, 8, truncation=True).extracts(i)[0] for i in range(3)] == [
        (0, 0, 8),
        (1, 0, 2),
        (2, 0, 8),
    ]
    assert len(padded(part, 8)) == 5


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_an_index_is_kept(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr("apt_core.data.packing.pieces.IN_MEMORY", in_memory)
    part = documents([5, 30, 2, 1, 17], prompts=True)
    made = PieceIndex.of(pack_documents(part, 8))
    kept = PieceIndex.kept_in(tmp_path / "index", lambda: pack_documents(part, 8))
    again = PieceIndex.kept_in(tmp_path / "index", lambda: iter(()))
    for index in (kept, again):
        for name in ("starts", "lengths", "row_ends", "targets"):
            kept_as, column = getattr(index, name), getattr(made, name)
            assert kept_as[:].tolist() == column.tolist()
            assert isinstance(kept_as, np.ndarray) == bool(in_memory)
            assert kept_as.sum(dtype=np.int64) == column.sum()
        for rows in ([], [0], [3, 0, 0, 1], list(range(len(made)))[::-1]):
            for a, b in zip(
                index.pieces_of(np.array(rows, int)),
                made.pieces_of(np.array(rows, int)),
                strict=True,
            ):
                assert a.tolist() == b.tolist()
    assert len(PieceIndex.kept_in(tmp_path / "none", lambda: iter(()))) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"index", "none"}


@pytest.mark.parametrize("name", FILES)
def test_an_index_that_is_cut_off_while_it_is_used_is_an_error(tmp_path, monkeypatch, name):
    """It ended the process with SIGBUS where it was mapped into memory."""
    monkeypatch.setattr("apt_core.data.packing.pieces.IN_MEMORY", 0)
    part = documents([5, 30, 2, 1, 17])
    index = PieceIndex.kept_in(tmp_path / "index", lambda: pack_documents(part, 8))
    windows = PieceWindows(part, 8, index, packed=True)
    os.truncate(tmp_path / "index" / name, 0)
    with pytest.raises(DamagedStoreError, match=f"{name} is shorter than it was"):
        windows.rows(np.array([1]))


@pytest.mark.parametrize("damage", ["starts", "row_ends", "sha256.json"])
def test_a_damaged_index_is_made_anew(tmp_path, caplog, damage):
    part = documents([5, 30, 2, 1, 17])

    def made() -> PieceIndex:
        return PieceIndex.kept_in(tmp_path / "index", lambda: pack_documents(part, 8))

    expected = made().starts.tolist()
    data = (tmp_path / "index" / damage).read_bytes()
    for wrong in (data[:-8], bytes([data[0] ^ 1]) + data[1:], b""):
        (tmp_path / "index" / damage).write_bytes(wrong)
        assert made().starts.tolist() == expected
        assert "is damaged and is made anew" in caplog.text
        caplog.clear()
        made()
        assert not caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


def test_an_index_that_cannot_be_kept_is_in_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    part = documents([5, 30])
    index = PieceIndex.kept_in(tmp_path / "file" / "index", lambda: pack_documents(part, 8))
    assert len(index) and "is not kept" in caplog.text


def test_longest_cuts_what_is_padding_in_the_whole_micro_batch():
    part = documents([3, 4, 9, 2])
    plan = plan_of(padded(part, 16), batch_size=4, accumulate=1, longest=True)
    (batch,) = plan.step(1, 0).batches
    assert batch.input_ids.shape == (4, 8)
    assert batch.num_tokens == 2 + 3 + 8 + 1


SOURCES = {
    "concat": lambda: [concat(1000)],
    "documents": lambda: [packed(documents([*range(2, 60)], prompts=True), 7)],
    "pad": lambda: [padded(documents([*range(2, 60)]), 7)],
    "mixture": lambda: [
        concat(700),
        packed(documents([*range(2, 50)], prompts=True), 7),
        concat(90),
    ],
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_step_is_a_function_of_its_number_alone(kind):
    """Whatever the number of workers and processes, and wherever a run begins."""
    alone = plan_of(*SOURCES[kind](), batch_size=2, accumulate=4)
    per_epoch = alone.steps_per_epoch
    positions = [divmod(n, per_epoch) for n in range(2 * per_epoch)]
    expected = [alone.step(epoch + 1, index) for epoch, index in positions]
    for batch in [batch for step in expected for batch in step.batches]:
        assert batch.num_targets == int((batch.targets != IGNORED).sum())
        is_token = batch.is_token if batch.document_ids is None else batch.document_ids >= 0
        tokens = batch.input_ids.numel() if is_token is None else int(is_token.sum())
        assert batch.num_tokens == tokens
        assert all(t.is_contiguous() for t in (batch.input_ids, batch.targets))
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for num_workers in (1, 2):
        plan = plan_of(*SOURCES[kind](), batch_size=2, accumulate=4, num_workers=num_workers)
        made = [plan.step(epoch + 1, index) for epoch, index in positions]
        for one, other in zip(expected, made, strict=True):
            assert [content(b) for b in one.batches] == [content(b) for b in other.batches]
            assert one[1:] == other[1:]
        # A jump, as a resume makes one, and a step back.
        for number in (len(positions) - 2, 3, 4, 3):
            epoch, index = positions[number]
            jumped = plan.step(epoch + 1, index).batches
            assert [content(b) for b in jumped] == [content(b) for b in expected[number].batches]
        plan.close()
    for world_size in (2, 4):
        ranks = [
            plan_of(
                *SOURCES[kind](),
                batch_size=2,
                accumulate=4 // world_size,
                rank=rank,
                world_size=world_size,
            )
            for rank in range(world_size)
        ]
        for (epoch, index), one in zip(positions, expected, strict=True):
            shares = [plan.step(epoch + 1, index) for plan in ranks]
            assert len({len(share.batches) for share in shares}) == 1
            assert {share[1:] for share in shares} == {one[1:]}
            dealt = [b for turn in zip(*(s.batches for s in shares), strict=True) for b in turn]
            dealt = [content(b) for b in dealt if b.num_targets]
            assert dealt == [content(b) for b in one.batches if b.num_targets]
    assert state[0] == random.getstate() and state[1] == np.random.get_state()[1].tolist()
    assert state[2] == torch.get_rng_state().tolist()
    assert [d.tolist() for d in alone.drawn(2, 1)] != [d.tolist() for d in alone.drawn(1, 1)]
    other = plan_of(*SOURCES[kind](), batch_size=2, accumulate=4, seed=2)
    assert [content(b) for b in other.step(1, 0).batches] != [
        content(b) for b in expected[0].batches
    ]


@quick
@given(
    count=st.integers(9, 400),
    seq_len=st.integers(1, 9),
    batch_size=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    world_size=st.integers(1, 4),
)
def test_processes_share_out_ragged_steps(count, seq_len, batch_size, accumulate, world_size):
    windows = concat(count, seq_len)
    alone = plan_of(windows, batch_size=batch_size, accumulate=accumulate * world_size)
    ranks = [
        plan_of(
            windows, batch_size=batch_size, accumulate=accumulate, rank=r, world_size=world_size
        )
        for r in range(world_size)
    ]
    for index in range(alone.steps_per_epoch):
        shares = [plan.step(1, index) for plan in ranks]
        assert len({len(share.batches) for share in shares}) == 1
        dealt = [b for turn in zip(*(s.batches for s in shares), strict=True) for b in turn]
        whole = alone.step(1, index)
        assert [b.input_ids.tolist() for b in dealt if b.num_targets] == [
            b.input_ids.tolist() for b in whole.batches
        ]
        assert {share.num_targets for share in shares} == {whole.num_targets}
        assert whole.num_tokens == alone.steps.step_tokens(index)


def test_a_failure_in_a_worker_is_raised_in_the_step():
    class Broken(ConcatWindows):
        def rows(self, indices):
            raise OSError("the disk is gone")

    plan = plan_of(Broken(ArrayPart(np.arange(99, dtype=np.uint8)), 7), num_workers=2)
    with pytest.raises(OSError, match="the disk is gone"):
        plan.step(1, 0)
    plan.close()


def test_a_batch_moves_as_a_whole():
    part = documents([4, 9, 3, 20], prompts=True)
    moved = plan_of(packed(part, 9), accumulate=1).step(1, 0).batches[0].to("meta")
    assert moved.input_ids.is_meta and moved.targets.is_meta
    assert moved.document_ids is not None and moved.document_ids.is_meta
    (batch,) = plan_of(padded(part, 32), batch_size=4, accumulate=1).step(1, 0).batches
    assert batch.to("meta").is_token.is_meta
    assert batch.to("meta").num_tokens == batch.num_tokens == 3 + 8 + 2 + 19


def test_a_step_that_is_not_there_is_an_error():
    plan = plan_of(concat(300))
    with pytest.raises(IndexError, match=f"of {plan.steps_per_epoch} steps"):
        plan.step(1, plan.steps_per_epoch)


# Evaluation ----------------------------------------------------------------------------------


@quick
@given(count=st.integers(2, 300), seq_len=st.integers(1, 12), batch_size=st.integers(1, 5))
def test_evaluation_sees_every_token_once_and_in_order(count, seq_len, batch_size):
    plan = EvaluationPlan([concat(count, seq_len)], batch_size=batch_size)
    batches = [plan.batch(index) for index in range(plan.num_batches)]
    check_targets(batches, {*range(1, count)})
    order = [t for batch in batches for t in batch.targets.flatten().tolist() if t != IGNORED]
    assert order == sorted(order)


def test_evaluation_goes_through_one_source_after_the_other():
    sources = [concat(20, 4), packed(documents([5, 3], prompts=True), 4), concat(9, 4)]
    plan = EvaluationPlan(sources, batch_size=2)
    seen = [row.tolist() for i in range(plan.num_batches) for row in plan.batch(i).input_ids]
    alone = [
        row.tolist() for windows in sources for row in windows.rows(np.arange(len(windows))).ids
    ]
    assert seen == alone


def test_a_bounded_evaluation_is_spread_over_the_text():
    plan = EvaluationPlan([concat(1000, 5)], batch_size=2)
    stretches = plan.stretches(4, 2)
    batches = [plan.batch(index) for windows in stretches for index in plan.batches_of(windows)]
    assert [batch.input_ids[0, 0].item() for batch in batches] == [0, 250, 500, 750]


@quick
@given(count=st.integers(2, 200), limit=st.integers(1, 9))
def test_how_a_stretch_is_cut_into_batches_changes_nothing(count, limit):
    def seen(batch_size: int) -> list[int]:
        plan = EvaluationPlan([concat(count, 3)], batch_size=batch_size)
        batches = [plan.batch(i) for w in plan.stretches(limit, 12) for i in plan.batches_of(w)]
        return [t for batch in batches for t in batch.targets.flatten().tolist()]

    assert seen(1) == seen(2) == seen(4) == seen(12)


def test_a_window_over_the_end_is_padded():
    batch = cut_windows(np.arange(10), [0, 1], 6)
    assert batch.targets[1].tolist() == [7, 8, 9, IGNORED, IGNORED, IGNORED]
    assert batch.num_targets == 9
