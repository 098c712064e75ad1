from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from apt_core.modeling import (
    Tokens,
    document_mask,
    document_positions,
    padding_marked,
    padding_mask,
    padding_positions,
)


def test_tokens_see_their_own_document_alone():
    ids = torch.tensor([[4, 4, 9, 9, 9], [1, 2, 2, 2, 1]])
    mask = document_mask(ids)
    assert (mask.shape, mask.dtype) == ((2, 1, 5, 5), torch.bool)
    for row in range(2):
        for query in range(5):
            for key in range(5):
                assert mask[row, 0, query, key] == (ids[row, query] == ids[row, key])


def test_places_start_anew_with_each_document():
    ids = torch.tensor([[4, 4, 9, 9, 9], [0, 1, 2, 2, 2]])
    expected = torch.tensor([[0, 1, 0, 1, 2], [0, 0, 0, 1, 2]])
    places = document_positions(ids)
    assert places.dtype == torch.int64
    assert torch.equal(places, expected)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4))
def test_places_count_within_documents_of_any_lengths(rows):
    width = max(sum(lengths) for lengths in rows)
    filled = [[*lengths, width - sum(lengths)] for lengths in rows]
    ids = [[n for n, length in enumerate(row) for _ in range(length)] for row in filled]
    expected = [[place for length in row for place in range(length)] for row in filled]
    assert document_positions(torch.tensor(ids)).tolist() == expected


def test_no_token_sees_the_filling():
    is_token = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    mask = padding_mask(is_token)
    assert (mask.shape, mask.dtype) == ((2, 1, 1, 4), torch.bool)
    assert torch.equal(mask[:, 0, 0], is_token.bool())
    assert torch.equal(padding_mask(is_token.bool()), mask)


def test_places_of_a_filled_row_count_its_tokens():
    is_token = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0]])
    places = padding_positions(is_token)
    assert places.dtype == torch.int64
    assert places.min() == 0
    assert torch.equal(padding_positions(is_token.bool()), places)
    for row, real in zip(places, is_token.bool(), strict=True):
        assert row[real].tolist() == list(range(int(real.sum())))


def test_layers_that_ask_know_inside_which_positions_are_padding():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].marked_tokens = None
    tokens = Tokens(torch.tensor([[True, False]]), 1)
    with pytest.raises(ValueError), padding_marked(model, tokens):
        assert model[1].marked_tokens is tokens and not hasattr(model[0], "marked_tokens")
        raise ValueError
    assert model[1].marked_tokens is None
    with padding_marked(model, None):
        assert model[1].marked_tokens is None
