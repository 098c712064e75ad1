"""No forward leaves the graph or reads a value: fake tensors have none, and fullgraph compiles."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from apt_core.modeling import document_mask, document_positions, padding_mask, padding_positions


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def faked(module, mode):
    """A copy of ``module`` whose parameters and buffers have shapes but no values."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(mode.from_tensor(parameter.detach())))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, mode.from_tensor(buffer))
    return module


def assert_no_value_is_read(module, make_input):
    """Forward, backward and decoding in pieces, with masks and positions and without."""
    mode = FakeTensorMode()
    module = faked(module, mode).train()
    with mode:
        documents = torch.zeros(2, 9, dtype=torch.int64)
        for call in (
            {},
            {"mask": document_mask(documents), "positions": document_positions(documents)},
            {"mask": padding_mask(documents), "positions": padding_positions(documents)},
        ):
            y = module(make_input(), **call)
            y = getattr(y, "logits", y)
            assert y.shape[:2] == (2, 9)
            y.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_no_attention_reads_a_value(attention):
    layer = attention.layer(dropout=0.1)
    assert_no_value_is_read(layer, lambda: torch.randn(2, 9, 32, dtype=torch.float64))


def test_a_layer_on_the_meta_device_tells_the_shape_of_its_output(attention):
    with torch.device("meta"):
        layer = attention.provider().create_layer(32, 4)
        assert layer(torch.empty(2, 5, 32)).shape == (2, 5, 32)


def test_no_model_reads_a_value(attention):
    model = attention.model(dropout=0.1, logits_soft_cap=20.0)
    assert_no_value_is_read(model, lambda: torch.zeros(2, 9, dtype=torch.int64))


def test_decoding_reads_no_value(attention):
    mode = FakeTensorMode()
    model = faked(attention.model(), mode).eval()
    with mode, torch.no_grad():
        caches = model.create_caches(9)
        for length in (4, 1, 3, 1):
            ids = torch.zeros(2, length, dtype=torch.int64)
            assert model(ids, caches=caches).logits.shape == (2, length, 256)


class Reads(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.read, self.weight = read, nn.Parameter(torch.ones(32, dtype=torch.float64))

    def forward(self, x, mask=None, positions=None):
        return x * self.weight * (2 if self.read(x) else 1)


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: x.max() > 0, lambda x: int(x[0, 0, 0])]
)
def test_a_layer_that_reads_a_value_would_be_seen(read):
    with pytest.raises(DataDependentOutputException):
        assert_no_value_is_read(Reads(read), lambda: torch.randn(2, 9, 32, dtype=torch.float64))


def trained(function, module, x, **call):
    """The output of ``function`` and the gradients of ``module``."""
    torch.manual_seed(1)
    module.zero_grad()
    y = function(x, **call)
    y = getattr(y, "logits", y)
    y.square().mean().backward()
    return {"y": y.detach(), **{name: p.grad for name, p in module.named_parameters()}}


def assert_same(compiled, eager, tolerance):
    assert compiled.keys() == eager.keys()
    for name, value in compiled.items():
        torch.testing.assert_close(value, eager[name], rtol=tolerance, atol=tolerance)


def assert_one_graph(module, x, **packed):
    """It trains as one graph, with dropout, and answers as one, with a mask: as it does eagerly.
    That single layers compile, at every length, their conformance checks say."""
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    module.train()
    dropped = trained(compiled, module, x)
    assert_same(dropped, trained(module, module, x), 1e-12)
    module.eval()
    with torch.no_grad():
        answers = [function(x, **packed) for function in (compiled, module)]
    answers = [getattr(answer, "logits", answer) for answer in answers]
    torch.testing.assert_close(*answers, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(dropped["y"], answers[0])


@pytest.fixture
def packed():
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [1] * 2])
    return {"mask": document_mask(documents), "positions": document_positions(documents)}


@pytest.mark.parametrize("position", ["rope", pytest.param("learned", marks=pytest.mark.long)])
def test_the_whole_model_compiles_to_one_graph(attention_of, packed, position):
    model = attention_of("tva_default", {"s": 2}).model(
        attention_pattern=["tva_default", "mha"],
        dropout=0.1,
        logits_soft_cap=20.0,
        position_name=position,
    )
    assert_one_graph(model, torch.randint(0, 256, (2, 9)), **packed)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile's default backend needs a C++ compiler",
)
@pytest.mark.long
def test_the_block_compiled_for_this_machine_gives_the_same(attention_of):
    block = attention_of("tva_default").block(dtype=torch.float32)
    x = torch.randn(2, 9, 32)
    with torch._inductor.config.patch(compile_threads=1):
        compiled = trained(torch.compile(block, fullgraph=True), block, x)
    assert_same(compiled, trained(block, block, x), 1e-5)
