"""Whatever calls a model on a batch lets its layers know what the batch knows."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import apt_core
import apt_plugins
from apt_core import hookimpl
from apt_core.data.batches import Batch, cut_windows
from apt_core.data.packing.rows import IGNORED
from apt_core.errors import ProviderError
from apt_core.modeling import forward_batch
from apt_core.modeling.backbones.gpt import GPTProvider
from apt_core.modeling.calling import losses_in_fp32
from apt_core.modeling.compilation import Compilation
from apt_core.modeling.layers.attention_mha import MHAProvider
from apt_core.modeling.layers.ffn import SwiGLUProvider
from apt_core.modeling.layers.norm import RMSNormProvider
from apt_core.modeling.masks import are_documents, document_mask
from apt_core.optim.averages import WeightAverage
from apt_core.testing import tiny_run
from apt_core.training.step.forward import Forward

LENGTH = 8


class Heard(nn.Module):
    """A feed-forward that keeps what it was told of the padding of each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SwiGLUProvider().create_layer(16, 32)
        self.marked_tokens = None
        self.heard = []

    def forward(self, x):
        marked = self.marked_tokens
        self.heard.append(None if marked is None else (marked.is_token.tolist(), marked.number))
        return self.inner(x)


def gpt(attention=None):
    torch.manual_seed(0)
    norm, provider = RMSNormProvider(), GPTProvider()
    block = provider.create_block(
        attention=attention or MHAProvider().create_layer(16, 2, max_seq_len=LENGTH),
        ffn=Heard(),
        norms=[norm.create_layer(16), norm.create_layer(16)],
        dropout=0.0,
    )
    model = provider.create_model(
        vocab_size=32,
        d_model=16,
        max_seq_len=LENGTH,
        blocks=[block],
        final_norm=norm.create_layer(16),
        position=nn.Embedding(LENGTH, 16),
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def packed(documents, *, positions=None):
    documents = torch.tensor(documents)
    ids = torch.randint(32, documents.shape, generator=torch.Generator().manual_seed(1))
    targets = torch.where(documents >= 0, ids, IGNORED)
    number = int((documents >= 0).sum())
    return Batch(ids, targets, number, positions, documents, number)


def test_each_way_to_call_a_model_tells_its_layers_of_the_padding():
    model = gpt()
    ffn = model.blocks[0].ffn
    batch = cut_windows(torch.arange(14).numpy(), [0, 1], LENGTH)
    expected = (batch.targets != IGNORED).tolist(), 13
    forward = Forward(model, Compilation(None, ""))
    average = WeightAverage(model, 0.9)
    ways = {
        "a step": lambda: forward(batch),
        "a second forward of a step": lambda: forward.output(batch),
        "an evaluation": lambda: forward.sums(batch, accuracy=True),
        "the loss by which a switch is judged": lambda: losses_in_fp32(model, batch),
        "other weights": lambda: forward.with_weights(average.values, batch),
        "an average": lambda: average.output(batch),
    }
    for way, call in ways.items():
        ffn.heard.clear()
        call()
        assert ffn.heard == [expected], way
        assert ffn.marked_tokens is None
        forward_batch(model, model, Batch.of_ids(batch.input_ids))
        assert ffn.heard[1] is None, way
    with pytest.raises(TypeError, match="pass the batch itself"):
        average.output(batch.input_ids)


def test_an_evaluation_of_a_run_sees_the_padding_as_a_step_does():
    heard = {True: [], False: []}

    class Listening:
        @hookimpl
        def on_training_start(self, trainer):
            ffn = trainer.model.blocks[0].ffn
            ffn.marked_tokens = None
            ffn.register_forward_pre_hook(self.listen)

        def listen(self, ffn, inputs):
            marked = ffn.marked_tokens
            heard[ffn.training].append(None if marked is None else marked.number)

    run = tiny_run(Listening(), steps=13, overrides={"evaluation.sample_tokens": 0})
    assert run.result.step == 13
    # The last window of the text, and of the held-out text, is no whole one.
    assert any(heard[True]) and not all(heard[True])
    assert any(heard[False]) and not all(heard[False])


def test_packed_documents_are_computed_as_each_is_alone():
    model = gpt()
    batch = packed([[0, 0, 0, 1, 1, 1, 1, 1], [4, 5, 5, 5, -1, -1, -1, -1]])
    output = forward_batch(model, model, batch).logits
    assert model.blocks[0].ffn.heard == [((batch.document_ids >= 0).tolist(), 12)]
    for row, first, end in ((0, 0, 3), (0, 3, 8), (1, 0, 1), (1, 1, 4)):
        alone = model(batch.input_ids[row : row + 1, first:end]).logits[0]
        torch.testing.assert_close(output[row, first:end], alone, rtol=0, atol=1e-5)
    forward, average = Forward(model, Compilation(None, "")), WeightAverage(model, 0.9)
    for again in (forward.output(batch), average.output(batch)):
        assert torch.equal(again.logits, output)
    summed = forward.sums(batch, accuracy=False)[0].item()
    assert summed == pytest.approx(losses_in_fp32(model, batch).sum().item(), rel=1e-5)
    shifted = packed(batch.document_ids.tolist(), positions=torch.zeros(2, LENGTH).long())
    assert not torch.allclose(forward_batch(model, model, shifted).logits, output, atol=1e-3)


class OfIds(nn.Module):
    """An attention that takes document ids."""

    takes_documents = True

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner, self.heard = inner, []

    def forward(self, x, *, mask=None, **call):
        self.heard.append(mask)
        dense = document_mask(mask, x.shape[1]) if are_documents(mask) else mask
        return self.inner(x, mask=dense, **call)


def test_layers_get_document_ids_as_they_are_or_one_boolean_mask_for_all(monkeypatch):
    made = []

    def making(*args):
        made.append(document_mask(*args))
        return made[-1]

    monkeypatch.setattr("apt_core.modeling.backbones.gpt.document_mask", making)
    heard = []

    class Hearing(MHAProvider().create_layer(16, 2, max_seq_len=LENGTH).__class__):
        def forward(self, x, *, mask=None, **call):
            heard.append(mask)
            return super().forward(x, mask=mask, **call)

    documents = [[0, 0, 0, 1, 1, 1, 1, 1], [4, 5, 5, 5, -1, -1, -1, -1]]
    batch, model, plain = packed(documents), gpt(), packed(documents)
    expected = forward_batch(model, model, plain).logits
    alone = model.blocks[0]
    alone.attention = taking = OfIds(alone.attention)
    made.clear()
    output = forward_batch(model, model, batch).logits
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert taking.heard == [batch.document_ids] and not made, "nobody needs a boolean mask"
    # Between others, of which one is wrapped by what knows of no document ids.
    for _ in range(3):
        model.blocks.append(copy.deepcopy(alone))
    for block in (model.blocks[1], model.blocks[3]):
        block.attention = Hearing(16, 2, max_seq_len=LENGTH)
    model.blocks[3].attention = Passing(model.blocks[3].attention)
    taking.heard.clear()
    model.blocks[2].attention.heard.clear()
    forward_batch(model, model, batch)
    (dense,) = made
    assert all(mask is dense for mask in heard) and len(heard) == 2
    assert taking.heard[0] is model.blocks[2].attention.heard[0] is batch.document_ids
    with pytest.raises(ValueError, match=r"document ids of shape \[2, 7\] for \[B, S\] = \[2, 8\]"):
        model(batch.input_ids, mask=batch.document_ids[:, 1:], positions=None)
    plain = Batch.of_ids(batch.input_ids)
    made.clear()
    forward_batch(model, model, plain)
    assert not made and taking.heard[-1] is None


class Passing(nn.Module):
    """A wrapper that hands everything on."""

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, **call):
        return self.inner(x, **call)


class Without(nn.Module):
    """A model, or an attention, that takes no mask, or takes anything and looks at nothing."""

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, **ignored):
        return self.inner(input_ids)


def test_a_model_that_cannot_keep_documents_apart_is_refused():
    batch = packed([[0, 0, 0, 1, 1, 1, 1, 1]])
    model = Without(gpt())
    with pytest.raises(ProviderError, match=r"Without\.forward takes no mask and no positions"):
        forward_batch(model, model, batch)
    plain = Batch.of_ids(batch.input_ids)
    assert torch.equal(forward_batch(model, model, plain).logits, model(plain.input_ids).logits)


def test_a_batch_takes_all_of_its_parts_along():
    batch = packed([[0, 0, 0, 1, 1, 1, 1, -1]], positions=torch.zeros(1, 8).long())
    moved = batch.to("meta")
    assert moved.positions.is_meta and moved.document_ids.is_meta
    assert (moved.num_targets, moved.num_tokens) == (7, 7)
    ids = batch.input_ids
    for wrong in ({"positions": ids[0]}, {"document_ids": ids}, {"num_tokens": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Batch(ids, ids, 8, **wrong)


MAY_CALL = {
    "apt_core/modeling/calling.py": "is the one way",
    "apt_core/testing/conformance/backbone.py": "calls it in each way that the contract has",
    "apt_core/hook_returns.py": "checks what a hook gave as a model",
}


def test_nothing_else_calls_a_model_on_a_batch():
    """A call hands on what its caller got (``**``), as in what ``forward_batch`` calls, and the ids
    of a batch are given to nothing."""
    found = []
    for package in (apt_core, apt_plugins):
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root.parent).as_posix()
            if name not in MAY_CALL:
                found += [f"{name}:{line}" for line in calls_of_models(path.read_text("utf-8"))]
    assert not found


def calls_of_models(source: str) -> list[int]:
    """The lines that call something named a model with ids alone, or give the ids of a batch to a
    call."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        arguments = [*node.args, *(k.value for k in node.keywords)]
        ids = any(isinstance(a, ast.Attribute) and a.attr == "input_ids" for a in arguments)
        moving = called in ("moved",)
        handing_on = any(k.arg is None for k in node.keywords)
        models = called.lstrip("_") in ("model", "teacher", "student")
        by_weights = called == "functional_call" and len(node.args) < 4
        if (ids and not moving) or by_weights or (models and not handing_on):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "call",
    [
        "model(ids)",
        "self._model(ids)",
        "trainer.model(batch)",
        "functional_call(model, w, (ids,))",
        "average.output(batch.input_ids)",
        "forward(ids=batch.input_ids)",
    ],
)
def test_a_call_that_leaves_the_mask_out_is_found(call):
    assert calls_of_models(f"x = {call}\n") == [1]
    assert not calls_of_models("model(ids, **rows); moved(self.input_ids); forward_batch(f, m, b)")
