from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from apt_core.config import parse_config
from apt_core.errors import ConfigError
from apt_core.inference import generate
from apt_core.kernel import boot
from apt_core.modeling import (
    ModelBuilder,
    document_mask,
    document_positions,
    padding_mask,
    padding_positions,
)
from apt_core.modeling.costs import model_cost
from apt_core.modeling.layers.ngram import FACTOR, PRIME, NgramCache, NgramEmbedding
from apt_core.modeling.lr_scale import learning_rate_scales
from apt_core.optim.parameter_groups import hidden_matrices, parameter_groups
from apt_core.plugin_manager import PluginManager
from apt_core.testing import tiny_session
from apt_core.types import GenerationRequest

NGRAM = {"orders": [2, 4], "buckets": [64, 128]}


@pytest.fixture
def small(attention_of):
    """A small model in float64 with n-gram tables that are not zero; keys of section model."""

    def build(**model):
        return attention_of("mha").model(**{"ngram": NGRAM, **model}).eval()

    return build


def expected_rows(ids, orders, buckets):
    """By the definition, in Python's whole numbers of any size; ``ids`` of one text."""
    rows = []
    for end in range(len(ids)):
        row, first = [], 0
        for order, size in zip(orders, buckets, strict=True):
            symbols = [ids[end - back] + 1 if back <= end else 0 for back in range(order)]
            value = sum(s * FACTOR ** (order - back) for back, s in enumerate(symbols))
            row.append(first + value % PRIME % size)
            first += size
        rows.append(row)
    return rows


@pytest.mark.parametrize("orders", [[2], [2, 3, 4], [5, 2]], ids=str)
@pytest.mark.parametrize("vocab_size", [3, 256, 2**24])
def test_rows_are_those_of_the_definition_for_any_vocabulary(orders, vocab_size):
    buckets = [101, 4096, 77][: len(orders)]
    ids = torch.randint(vocab_size, (2, 9))
    ids[0] = vocab_size - 1
    found = NgramEmbedding(4, orders, buckets).rows(ids)
    assert found.tolist() == [expected_rows(text, orders, buckets) for text in ids.tolist()]


def test_ngrams_are_spread_over_the_rows():
    ids = torch.randint(97, 123, (1, 20_000))
    rows = NgramEmbedding(1, [2, 4], [4096, 2**14]).rows(ids)[0]
    # Rows drawn at random would leave 623 of 676 pairs apart, and take 11,550 of 16,384 rows.
    assert rows[:, 0].unique().numel() > 600
    assert rows[:, 1].unique().numel() > 11_300


def test_a_token_changes_the_ngrams_that_it_ends_or_is_in():
    ids = torch.randint(256, (1, 12))
    other = ids.clone()
    other[0, 5] += 1
    layer = NgramEmbedding(4, [2, 4], [2**20, 2**20])
    changed = (layer.rows(ids) != layer.rows(other))[0].int().T.tolist()
    assert changed == [[0] * 5 + [1, 1] + [0] * 5, [0] * 5 + [1] * 4 + [0] * 3]


def test_a_model_starts_as_it_does_without_ngrams(tiny):
    ids = torch.randint(256, (2, 20))
    without = ModelBuilder(tiny).build_model()
    tiny["model"]["ngram"] = {}
    model = ModelBuilder(tiny).build_model()
    assert torch.equal(model(ids).logits, without(ids).logits)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes.pop("ngram.weight") == (4096 + 16384 + 16384, 32)
    assert shapes == {name: value.shape for name, value in without.state_dict().items()}
    model(ids).logits.sum().backward()
    assert model.ngram.weight.grad.any()


@pytest.mark.parametrize("position", ["rope", "learned", "none"])
def test_a_packed_document_sees_no_ids_of_another(small, position):
    model = small(position_name=position)
    texts = [torch.randint(256, (1, length)) for length in (5, 1, 7)]
    documents = torch.tensor([[0] * 5 + [1] + [2] * 7])
    packed = model(
        torch.cat(texts, dim=1),
        mask=document_mask(documents),
        positions=document_positions(documents),
    ).logits
    alone = torch.cat([model(text).logits for text in texts], dim=1)
    torch.testing.assert_close(packed, alone)


def test_filling_before_a_text_is_no_part_of_it(small):
    model, text = small(), torch.randint(256, (1, 6))
    filled = torch.cat([torch.full((1, 4), 9), text], dim=1)
    is_token = torch.tensor([[0] * 4 + [1] * 6])
    seen = model(filled, mask=padding_mask(is_token), positions=padding_positions(is_token)).logits
    torch.testing.assert_close(seen[:, 4:], model(text).logits)


@pytest.mark.parametrize("pieces", [[10], [1] * 10, [2, 1, 7], [5, 1, 1, 3]], ids=str)
@pytest.mark.parametrize("position", ["rope", "learned", "none"])
def test_decoding_in_pieces_is_reading_the_whole(small, pieces, position):
    model, ids = small(position_name=position), torch.randint(256, (2, 10))
    with torch.no_grad():
        caches = model.create_caches(10)
        found = [model(piece, caches=caches).logits for piece in ids.split(pieces, dim=1)]
        assert [cache.length for cache in caches] == [10] * 3
        torch.testing.assert_close(torch.cat(found, dim=1), model(ids).logits)


def test_decoding_goes_on_after_a_part_was_forgotten(small):
    model, ids = small(), torch.randint(256, (1, 10))
    with torch.no_grad():
        caches = model.create_caches(10)
        model(ids[:, :4], caches=caches)
        model(torch.full((1, 5), 7), caches=caches)
        for cache in caches:
            cache.truncate(4)
        found = model(ids[:, 4:], caches=caches).logits
        torch.testing.assert_close(found, model(ids).logits[:, 4:])


def test_texts_that_are_filled_up_are_decoded_together(small):
    model, text = small(), torch.randint(256, (1, 9))
    ids = torch.cat([torch.full((1, 3), 9), text], dim=1)
    is_token = torch.tensor([[0] * 3 + [1] * 9])
    positions, mask = padding_positions(is_token), padding_mask(is_token)
    with torch.no_grad():
        caches = model.create_caches(12)
        found = [
            model(
                ids[:, start:end],
                mask=mask[..., :end],
                positions=positions[:, start:end],
                caches=caches,
            ).logits
            for start, end in ((0, 5), (5, 6), (6, 12))
        ]
    torch.testing.assert_close(torch.cat(found, dim=1)[:, 3:], model(text).logits)


def test_a_window_that_moves_on_gives_the_same_text_with_and_without_caches(small, monkeypatch):
    model = small(max_seq_len=12).float()
    session = replace(tiny_session(overrides={"model.max_seq_len": 12}), model=model)
    request = GenerationRequest(prompt="the text", max_new_tokens=30, temperature=0.0)

    def text():
        return generate(session, request).token_ids

    cached = text()
    monkeypatch.setattr(type(model), "create_caches", None)
    assert cached == text()


def test_a_cache_that_is_too_short_says_so_and_stays_as_it_was():
    cache = NgramCache(6, reach=3)
    assert cache.nbytes == 0
    assert cache.append(torch.ones(2, 4, dtype=torch.int64)).tolist() == [[0, 0, 0, 1, 1, 1, 1]] * 2
    assert cache.nbytes == 2 * (3 + 6) * 8
    with pytest.raises(ValueError, match="cache for 6 tokens cannot hold 7: create a longer one"):
        cache.append(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="cache of 2 texts cannot take 1"):
        cache.append(torch.ones(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="a cache of 4 tokens cannot be cut to 5"):
        cache.truncate(5)
    assert cache.length == 4


@pytest.mark.parametrize("by_width", [True, False])
def test_the_tables_learn_faster_and_are_no_hidden_matrices(tiny, by_width):
    tiny["model"] |= {"ngram": {"lr_scale": 5.0}, "tie_embeddings": False}
    model = ModelBuilder(tiny).build_model()
    scales = learning_rate_scales(model, 32 if by_width else None)
    assert scales["ngram.weight"] == 5.0
    assert ("head.weight" in scales) == by_width == (len(scales) > 1)
    assert "ngram.weight" not in hidden_matrices(model)
    groups = parameter_groups(
        model, PluginManager(), learning_rate=0.1, weight_decay=0.01, scales=scales
    )
    (group,) = [g for g in groups if any(p is model.ngram.weight for p in g["params"])]
    assert group["lr"] == pytest.approx(0.5) and len(group["params"]) == 1
    assert group["lr"] * group["weight_decay"] == pytest.approx(0.1 * 0.01)


def test_a_factor_of_a_module_meets_that_of_its_width():
    model = torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False))
    model[0].lr_scales = {"weight": 3.0}
    assert learning_rate_scales(model, 64) == {"0.weight": 3.0 * 1536 / 64}
    assert learning_rate_scales(model, None) == {"0.weight": 3.0}


@pytest.mark.long
def test_compiled_sharded_and_narrow_models_agree(small, tmp_path):
    model, ids = small(embedding_norm=True).float(), torch.randint(256, (2, 10))
    documents = torch.tensor([[0] * 4 + [1] * 6] * 2)
    packed = {"mask": document_mask(documents), "positions": document_positions(documents)}
    with torch.no_grad():
        expected = model(ids, **packed).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, **packed).logits, expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = model(ids, **packed).logits.float()
        assert (narrow - expected).norm() < 0.05 * expected.norm()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with torch.no_grad():
            torch.testing.assert_close(model(ids, **packed).logits, expected)
            caches = model.create_caches(10)
            pieces = [model(piece, caches=caches).logits for piece in ids.split([4, 6], dim=1)]
            torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits)
    finally:
        dist.destroy_process_group()


def test_the_plan_counts_the_tables(tiny):
    kernel = boot({**tiny, "model": {**tiny["model"], "ngram": NGRAM, "embedding_norm": True}})
    with torch.device("meta"):
        model = ModelBuilder(kernel.config, kernel.registry).build_model()
    assert model.ngram.weight.is_meta
    parts = {part.kind: part.params for part in model_cost(kernel).parts}
    assert parts["ngrams"] == (64 + 128) * 32
    assert parts["embeddings"] == 256 * 32 and parts["norm"] == (2 * 2 + 2) * 32
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())


def test_normalised_embeddings_have_no_scale(small):
    ids = torch.randint(256, (2, 10))
    for norms, same in ((True, True), (False, False)):
        model = small(embedding_norm=norms, tie_embeddings=False)
        before = model(ids).logits
        with torch.no_grad():
            for table in (model.embedding, model.ngram):
                table.weight *= 8
        assert torch.allclose(model(ids).logits, before, atol=1e-5) == same


@pytest.mark.parametrize(
    ("ngram", "key", "words"),
    [
        ({"orders": [2, 2], "buckets": [8, 8]}, "orders", "has an order twice"),
        ({"orders": [2, 3], "buckets": [8]}, "buckets", "2 orders and 1 tables"),
        ({"orders": [2, 3]}, "orders", "2 orders and 3 tables"),
        ({"orders": [1], "buckets": [8]}, "orders[0]", "must be at least 2"),
        ({"orders": [], "buckets": []}, "orders", "must not be empty"),
    ],
)
def test_settings_that_do_not_fit_together_are_named(ngram, key, words):
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": {"ngram": ngram}})
    problem = caught.value.problems[0]
    assert problem.key == f"model.ngram.{key}" and words in problem.message


@pytest.mark.parametrize(
    ("orders", "buckets", "key"),
    [([1], [8], "orders"), ([], [], "orders"), ([2, 3], [8], "buckets"), ([2], [0], "buckets")],
)
def test_a_layer_from_a_script_refuses_what_a_profile_cannot_have(orders, buckets, key):
    with pytest.raises(ValueError, match=rf"model\.ngram\.{key}"):
        NgramEmbedding(4, orders, buckets)
