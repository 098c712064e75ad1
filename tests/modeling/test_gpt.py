from __future__ import annotations

import pytest
import torch

from apt_core.errors import ConfigError
from apt_core.modeling import (
    ModelBuilder,
    document_mask,
    document_positions,
    initialize_parameters,
    padding_mask,
    padding_positions,
)
from apt_core.modeling.layers import TVAProvider
from apt_core.providers.attention import TVASettings
from apt_core.types import ProviderSpec

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def some_ids(length, batch=2):
    return torch.randint(0, 256, (batch, length))


@pytest.fixture(params=["rope", "learned", "none"])
def model(request, attention_of):
    """A model with two attentions, and each way to tell positions."""
    return attention_of("tva_default", {"r": 2, "s": 2}, num_kv_heads=2).model(
        attention_pattern=["tva_default", "mha"], position_name=request.param
    )


def test_the_model_returns_logits_and_hidden_states(shelf, tiny):
    model = ModelBuilder(tiny, shelf).build_model()
    output = model(torch.randint(0, 256, (2, 24)))
    assert output.logits.shape == (2, 24, 256)
    assert output.hidden.shape == (2, 24, 32)


def test_the_model_sees_no_later_token(attention):
    model, ids = attention.model(), some_ids(9)
    x = model.embedding(ids).detach().requires_grad_()
    model.embedding.register_forward_hook(lambda *_: x)
    logits = model(ids).logits
    for t in range(9):
        (gradient,) = torch.autograd.grad(logits[:, t].sum(), x, retain_graph=True)
        assert gradient[:, t + 1 :].abs().sum() == 0
        assert (gradient[:, : t + 1].abs().sum(-1) > 0).all()


def pieces_of(model, ids, pieces, **call):
    caches = model.create_caches(ids.shape[1])
    with torch.no_grad():
        parts = [model(part, caches=caches, **call).logits for part in ids.split(pieces, dim=1)]
    assert {cache.length for cache in caches} == {ids.shape[1]}
    return torch.cat(parts, dim=1)


PIECES = pytest.mark.parametrize("pieces", [[1] * 9, [4, 5], [3, 1, 5]], ids=str)


@PIECES
def test_decoding_with_caches_gives_what_the_whole_gives(attention, pieces):
    model, ids = attention.model(), some_ids(9)
    torch.testing.assert_close(pieces_of(model, ids, pieces), model(ids).logits, **EXACT)


@PIECES
def test_decoding_with_caches_knows_its_place(model, pieces):
    ids = some_ids(9)
    torch.testing.assert_close(pieces_of(model, ids, pieces), model(ids).logits, **EXACT)


def test_a_model_decodes_without_caches_where_an_attention_has_none(model):
    assert len(model.create_caches(9)) == 2
    model.blocks[1].attention = torch.nn.Identity()
    assert model.create_caches(9) is None


def test_texts_of_different_lengths_decode_together(attention):
    model = attention.model()
    texts = [some_ids(9, batch=1), some_ids(6, batch=1)]
    alone = [model(text).logits for text in texts]
    ids = torch.cat([texts[0], torch.nn.functional.pad(texts[1], (3, 0))])
    is_token = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    mask, positions = padding_mask(is_token), padding_positions(is_token)
    caches, parts = model.create_caches(9), []
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 9)):
            call = {"mask": mask[..., :end], "positions": positions[:, start:end]}
            parts.append(model(ids[:, start:end], caches=caches, **call).logits)
    together = torch.cat(parts, dim=1)
    torch.testing.assert_close(together[:1], alone[0], **EXACT)
    torch.testing.assert_close(together[1:, 3:], alone[1], **EXACT)


def test_packed_documents_give_what_each_gives_alone(attention):
    assert_packed_is_separate(attention.model())


def test_packed_documents_start_at_the_first_position(model):
    assert_packed_is_separate(model)


def assert_packed_is_separate(model):
    ids = some_ids(9)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [7, 7, 7, 7, 7, 7, 3, 3, 3]])
    call = {"mask": document_mask(documents), "positions": document_positions(documents)}
    packed = model(ids, **call).logits
    for row, ends in enumerate([(3, 5, 9), (6, 9)]):
        for start, end in zip((0, *ends), ends, strict=False):
            alone = model(ids[row : row + 1, start:end]).logits
            torch.testing.assert_close(packed[row : row + 1, start:end], alone, **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_text_gives_what_it_gives_alone(model, side):
    ids, is_token = some_ids(9), torch.zeros(2, 9, dtype=torch.bool)
    kept = slice(4, 9) if side == "left" else slice(0, 5)
    is_token[0] = True
    is_token[1, kept] = True
    call = {"mask": padding_mask(is_token), "positions": padding_positions(is_token)}
    padded = model(ids, **call).logits
    torch.testing.assert_close(padded[:1], model(ids[:1]).logits, **EXACT)
    torch.testing.assert_close(padded[1:, kept], model(ids[1:, kept]).logits, **EXACT)


def test_a_row_of_filling_alone_leaves_everything_finite(attention):
    model, ids = attention.model(), some_ids(9)
    is_token = torch.ones(2, 9, dtype=torch.bool)
    is_token[1] = False
    call = {"mask": padding_mask(is_token), "positions": padding_positions(is_token)}
    output = model(ids, **call)
    output.logits.square().mean().backward()
    assert output.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(output.logits[:1], model(ids[:1]).logits, **EXACT)


def test_dropout_acts_in_training_alone(attention_of):
    ids, dropping = some_ids(5), attention_of("mha").model(dropout=0.5)
    whole = attention_of("mha").model()(ids).logits
    torch.testing.assert_close(dropping.eval()(ids).logits, whole, rtol=0, atol=0)
    assert not torch.allclose(dropping.train()(ids).logits, whole, atol=1e-3)


def test_the_soft_cap_bounds_the_logits_and_nothing_else(attention_of):
    free = attention_of("mha").model()
    capped = attention_of("mha").model(logits_soft_cap=1.5)
    ids = some_ids(5)
    logits = free(ids).logits
    assert logits.abs().max() > 1.5
    torch.testing.assert_close(capped(ids).logits, 1.5 * torch.tanh(logits / 1.5), **EXACT)
    torch.testing.assert_close(capped(ids).hidden, free(ids).hidden, **EXACT)


def test_the_block_under_bf16_autocast_stays_near_fp32(attention, autocast_errors):
    block = attention.block(dtype=torch.float32, d_model=64, d_ff=128, max_seq_len=64)
    of_output, of_gradients = autocast_errors(block, torch.randn(2, 64, 64))
    # Seen: at most 0.0046 and 0.0103.
    assert 0.001 < of_output < 0.01
    assert max(of_gradients.values()) < 0.025, of_gradients


@pytest.mark.parametrize("tie", [False, True])
def test_tying_shares_one_matrix(shelf, tiny, tie):
    tiny["model"]["tie_embeddings"] = tie
    model = ModelBuilder(tiny, shelf).build_model()
    names = [name for name, _ in model.named_parameters()]
    assert ("head.weight" in names) is not tie
    assert model(torch.tensor([[3]])).logits.shape == (1, 1, 256)


def test_the_first_loss_is_near_that_of_guessing(shelf, tiny):
    model = ModelBuilder(tiny, shelf).build_model()
    ids = torch.arange(96).view(4, 24)
    loss = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten() + 96)
    assert abs(loss.item() - 5.545) < 0.4


def test_a_model_on_the_meta_device_takes_no_memory_and_can_be_given_some(shelf, tiny):
    with torch.device("meta"):
        empty = ModelBuilder(tiny, shelf).build_model()
    assert all(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    real = ModelBuilder(tiny, shelf).build_model()
    empty.to_empty(device="cpu")
    initialize_parameters(empty, seed=7, num_layers=2)
    ids = torch.randint(0, 256, (1, 9))
    assert torch.equal(empty(ids).logits, real(ids).logits)


def test_a_pattern_of_attentions_repeats_over_the_layers(shelf, tiny):
    class Other(TVAProvider):
        pass

    shelf.add(ProviderSpec("attention", "other", Other))
    tiny["model"] |= {"num_layers": 5, "attention_pattern": ["tva_default", "other"]}
    tiny["model"]["tva"] = {"rank": 6}
    builder = ModelBuilder(tiny, shelf)
    names = ["tva_default", "other", "tva_default", "other", "tva_default"]
    assert builder.attention_names() == names
    ranks = [block.attention.rank for block in builder.build_model().blocks]
    own = TVASettings().rank_of(8)
    assert ranks == [6, own, 6, own, 6] != [6] * 5


def test_a_dict_that_is_no_profile_is_bad_input(shelf):
    with pytest.raises(ConfigError, match="d_modle"):
        ModelBuilder({"model": {"d_modle": 32}}, shelf)


def test_a_sequence_that_is_too_long_names_the_setting(model):
    said = r"25 tokens is longer than model.max_seq_len 24: shorten it or raise the setting"
    with pytest.raises(ValueError, match=said):
        model(some_ids(25))
    caches = model.create_caches(32)
    with torch.no_grad():
        model(some_ids(20), caches=caches)
        with pytest.raises(ValueError, match=said):
            model(some_ids(5), caches=caches)


def test_a_full_cache_says_so_and_decoding_can_go_on(model):
    ids, caches = some_ids(8), model.create_caches(8)
    with torch.no_grad():
        first = model(ids[:, :6], caches=caches).logits
        with pytest.raises(ValueError, match="cache for 8 tokens cannot hold 9: create a longer"):
            model(some_ids(3), caches=caches)
        rest = model(ids[:, 6:], caches=caches).logits
    torch.testing.assert_close(torch.cat([first, rest], dim=1), model(ids).logits, **EXACT)


@pytest.mark.parametrize(
    ("model_section", "key"),
    [
        ({"num_heads": 5}, "model.(d_model|num_heads)"),
        ({"num_kv_heads": 3}, "model.num_kv_heads"),
        ({"tva": {"rank": 9}}, "model.tva.rank"),
        ({"tva": {"rank": 3}}, "model.tva.rank"),
        ({"tva": {"r": 16}}, "model.tva.r"),
        ({"attention_name": "mha", "num_heads": 32}, "model.(d_model|num_heads)"),
    ],
)
def test_a_model_that_cannot_be_built_says_so_before_it_runs(shelf, tiny, model_section, key):
    tiny["model"] |= model_section
    with pytest.raises(ConfigError, match=rf"{key}\b"):
        ModelBuilder(tiny, shelf).build_model()


def test_one_layer_without_a_cache_leaves_the_model_without(shelf, tiny, caplog):
    caplog.set_level("INFO", "apt.modeling")
    model = ModelBuilder(tiny, shelf).build_model()
    assert len(model.create_caches(4)) == 2
    model.blocks[1].attention.create_cache = lambda max_length: None
    assert model.create_caches(4) is None
    assert "TVAAttention decodes without a cache" in caplog.text
