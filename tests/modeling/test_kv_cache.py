from __future__ import annotations

import pytest
import torch

from apt_core.modeling import KeyValueCache


def pair(length, start=0, batch=2, heads=3, width=4):
    """Keys that count from ``start``, and values half as wide that count down."""
    places = torch.arange(start, start + length, dtype=torch.float32)[:, None]
    return (
        places.expand(batch, heads, length, width).clone(),
        -places.expand(batch, heads, length, 2).clone(),
    )


@pytest.mark.parametrize("pieces", [[7], [1] * 7, [3, 4], [5, 1, 1]], ids=str)
def test_what_is_appended_is_held_in_order(pieces):
    cache, start = KeyValueCache(7), 0
    for length in pieces:
        keys, values = cache.append(*pair(length, start))
        start += length
        assert cache.length == start
        for held, wanted in zip((keys, values), pair(start), strict=True):
            assert torch.equal(held, wanted)


def test_appending_copies_nothing_that_is_held():
    cache = KeyValueCache(8)
    keys, values = cache.append(*pair(3))
    later_keys, later_values = cache.append(*pair(2, 3))
    assert later_keys.data_ptr() == keys.data_ptr()
    assert later_values.data_ptr() == values.data_ptr()


def test_keys_and_values_keep_their_precision():
    keys, values = pair(3)
    held = KeyValueCache(8).append(keys.double(), values.bfloat16())
    assert [part.dtype for part in held] == [torch.float64, torch.bfloat16]


def test_what_was_forgotten_is_written_over():
    cache = KeyValueCache(6)
    cache.append(*pair(6))
    cache.truncate(2)
    assert cache.length == 2
    keys, _ = cache.append(*pair(3, start=20))
    assert keys[0, 0, :, 0].tolist() == [0, 1, 20, 21, 22]
    cache.truncate(5)
    cache.truncate(0)
    assert cache.append(*pair(1, start=9))[0].shape == (2, 3, 1, 4)


@pytest.mark.parametrize("held", [0, 3, 6])
def test_a_cache_that_is_too_short_says_so_and_stays_as_it_was(held):
    cache = KeyValueCache(6)
    cache.append(*pair(held))
    with pytest.raises(ValueError, match="cache for 6 tokens cannot hold 7: create a longer one"):
        cache.append(*pair(7 - held))
    assert cache.length == held
    keys, _ = cache.append(*pair(6 - held, held))
    assert torch.equal(keys, pair(6)[0])


@pytest.mark.parametrize("length", [-1, 4])
def test_a_cache_cannot_be_cut_to_what_it_never_held(length):
    cache = KeyValueCache(6)
    cache.append(*pair(3))
    with pytest.raises(ValueError, match=f"a cache of 3 tokens cannot be cut to {length}"):
        cache.truncate(length)
    assert cache.length == 3


@pytest.mark.parametrize("other", [{"batch": 1}, {"batch": 3}, {"heads": 1}, {"width": 6}], ids=str)
def test_a_cache_takes_no_other_batch_than_its_first(other):
    cache = KeyValueCache(6)
    cache.append(*pair(3))
    with pytest.raises(ValueError, match=r"heads and widths \[2, 3, 4, 2\] cannot take"):
        cache.append(*pair(1, **other))
    assert cache.length == 3


def test_it_takes_room_for_all_from_the_first_tokens_on():
    cache = KeyValueCache(6)
    assert cache.nbytes == 0
    cache.append(*pair(1))
    assert cache.nbytes == 2 * 3 * 6 * (4 + 2) * 4
