from __future__ import annotations

import pytest
import torch

from apt_core.errors import ConfigError
from apt_core.modeling import ModelBuilder, initialize_parameters
from apt_core.modeling.layers import TVAProvider
from apt_core.types import ProviderSpec


def test_the_model_returns_logits_and_hidden_states(shelf, tiny):
    model = ModelBuilder(tiny, shelf).build_model()
    output = model(torch.randint(0, 256, (2, 24)))
    assert output.logits.shape == (2, 24, 256)
    assert output.hidden.shape == (2, 24, 32)
    assert output.aux == {}


def test_what_layers_put_into_aux_is_averaged_over_the_blocks(shelf, tiny):
    model = ModelBuilder(tiny, shelf).build_model()
    for value, block in enumerate(model.blocks):
        block.ffn.aux = {"load": torch.tensor(float(value))}
    assert model(torch.zeros(1, 2, dtype=torch.int64)).aux["load"] == 0.5


def test_the_model_sees_no_later_token(shelf, tiny):
    model = ModelBuilder(tiny, shelf).build_model()
    ids = torch.randint(0, 256, (1, 12))
    changed = ids.clone()
    changed[0, 6:] = (changed[0, 6:] + 1) % 256
    ours, theirs = model(ids).logits, model(changed).logits
    torch.testing.assert_close(ours[:, :6], theirs[:, :6])
    assert not torch.allclose(ours[:, 6:], theirs[:, 6:])


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
    builder = ModelBuilder(tiny, shelf)
    names = ["tva_default", "other", "tva_default", "other", "tva_default"]
    assert builder.attention_names() == names
    ranks = [block.attention.rank for block in builder.build_model().blocks]
    assert ranks == [4, 2, 4, 2, 4]


def test_a_dict_that_is_no_profile_is_bad_input(shelf):
    with pytest.raises(ConfigError, match="d_modle"):
        ModelBuilder({"model": {"d_modle": 32}}, shelf)


def test_a_sequence_that_is_too_long_names_the_setting(shelf, tiny):
    model = ModelBuilder(tiny, shelf).build_model()
    with pytest.raises(ValueError, match=r"25 tokens is longer than model.max_seq_len 24"):
        model(torch.zeros(1, 25, dtype=torch.int64))
