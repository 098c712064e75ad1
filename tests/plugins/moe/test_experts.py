from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from apt_core.device import PLANNED_CAPABILITY, autocast
from apt_core.planning.footprint import CountedAllocations
from apt_core.planning.gpu_operators import GPUOperators
from apt_plugins.moe import cpu_experts, cpu_memory
from apt_plugins.moe.device_experts import assigned_on_device, runs_grouped
from apt_plugins.moe.experts import Experts

CPU = torch.device("cpu")
ACTIVATIONS = ("swiglu", "gelu", "relu2")


def inputs(experts, tokens=13, top_k=2, dtype=torch.float64):
    """x, indices, of which the last expert gets none and two are nobody's, and weights."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, experts.d_model, generator=generator, dtype=dtype)
    choice = torch.rand(tokens, experts.num_experts - 1, generator=generator)
    indices = choice.topk(top_k).indices
    indices[4, 1] = indices[2, 0] = -1
    weights = torch.rand(tokens, top_k, generator=generator, dtype=dtype)
    return x.requires_grad_(), indices, weights.requires_grad_()


def experts_of(activation="swiglu", number=5, dtype=torch.float64):
    experts = Experts(number, 8, 16, activation).to(dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return experts


def gradients(y, *wanted):
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return torch.autograd.grad(y, wanted, upstream)


def tensors_of(experts):
    return getattr(experts, "gate", None), experts.up, experts.down


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_function(activation):
    experts = experts_of(activation, number=3)
    x, indices, weights = inputs(experts, tokens=5)
    names = [name for name, _ in experts.named_parameters()]

    def call(x, weights, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(experts, parameters, (x, indices, weights))

    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.mul_(0.3)
    assert torch.autograd.gradcheck(call, (x, weights, *experts.parameters()))


def test_an_expert_that_nobody_chose_has_gradients_of_zero():
    experts = experts_of()
    x, indices, weights = inputs(experts)
    d_gate, d_up, d_down = gradients(experts(x, indices, weights), *experts.parameters())
    for gradient in (d_gate, d_up, d_down):
        assert gradient[-1].abs().max() == 0
        assert gradient[:-1].abs().amax((1, 2)).min() > 0


def test_an_index_of_nobody_adds_nothing():
    experts = experts_of()
    x, indices, weights = inputs(experts)
    y = experts(x, indices, weights)
    (d_weights,) = gradients(y, weights)
    assert d_weights[4, 1] == d_weights[2, 0] == 0
    without = weights.detach().clone()
    without[4, 1] = without[2, 0] = 0
    torch.testing.assert_close(y, experts(x, indices.clamp(min=0), without))
    nobody = experts(x, torch.full_like(indices, -1), weights)
    assert nobody.abs().max() == 0
    assert all(g.abs().max() == 0 for g in gradients(nobody, x, weights, *experts.parameters()))


def test_the_same_numbers_give_the_same_bits(monkeypatch):
    experts = experts_of(dtype=torch.float32)
    x, indices, weights = inputs(experts, tokens=200, dtype=torch.float32)
    first, second = (
        (y, *gradients(y, x, weights, *experts.parameters()))
        for y in (experts(x, indices, weights), experts(x, indices, weights))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_how_rows_are_cut_changes_nothing(rows, monkeypatch):
    experts = experts_of()
    x, indices, weights = inputs(experts, tokens=40)
    wanted = (x, weights, *experts.parameters())
    y = experts(x, indices, weights)
    expected = (y, *gradients(y, *wanted))
    monkeypatch.setattr(cpu_experts, "MOST_ROWS", rows)
    y = experts(x, indices, weights)
    for found, other in zip((y, *gradients(y, *wanted)), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-12, atol=1e-12)


def test_a_large_gradient_is_in_kept_memory_and_the_same(monkeypatch):
    experts = experts_of(dtype=torch.float32)
    x, indices, weights = inputs(experts, dtype=torch.float32)
    expected = gradients(experts(x, indices, weights), *experts.parameters())
    monkeypatch.setattr(cpu_memory, "FRESH_BYTES", 0)
    found = gradients(experts(x, indices, weights), *experts.parameters())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("limit", [None, 11])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_padded_and_looped_products_give_what_the_cpu_gives(activation, limit):
    experts = experts_of(activation)
    x, indices, weights = inputs(experts)
    assert torch.bincount(indices.flatten() + 1)[1:].max() <= (limit or len(x))
    wanted = (x, weights, *experts.parameters())
    y = experts(x, indices, weights)
    tensors = (x, indices, weights, *tensors_of(experts), None)
    padded = assigned_on_device(activation, *tensors, limit=limit)
    torch.testing.assert_close(padded, y)
    for found, expected in zip(gradients(padded, *wanted), gradients(y, *wanted), strict=True):
        torch.testing.assert_close(found, expected)


class Largest(TorchDispatchMode):
    """Notes the most elements of any result."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_memory_without_a_limit_does_not_grow_with_the_number_of_experts():
    def largest(experts: int) -> int:
        tensors = tensors_of(experts_of(number=experts, dtype=torch.float32))
        x = torch.randn(64, 8, requires_grad=True)
        indices = torch.stack([torch.randperm(experts)[:2] for _ in range(64)])
        weights = torch.rand(64, 2, requires_grad=True)
        with Largest() as seen:
            y = assigned_on_device("swiglu", x, indices, weights, *tensors, None, limit=None)
            y.sum().backward()
        return seen.elements

    parameters = 32 * 8 * 16
    assert largest(32) <= max(parameters, largest(8))


class Named(TorchDispatchMode):
    """Counts the operations by their names."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("limit", "grouped"), [(None, True), (None, False), (11, False)])
def test_assignments_are_sorted_once_and_no_gradient_sorts_again(limit, grouped, monkeypatch):
    """A gradient added up by index is sorted on a GPU."""
    monkeypatch.setattr("apt_plugins.moe.device_experts.runs_grouped", lambda *_: grouped)
    experts = experts_of(dtype=torch.float32)
    x, indices, weights = inputs(experts, dtype=torch.float32)
    tensors = (x, indices, weights, *tensors_of(experts), None)
    with Named() as seen:
        assigned_on_device("swiglu", *tensors, limit=limit).sum().backward()
    sums = [name for name in seen.names if name.startswith(("index_put", "index_add", "scatter_a"))]
    assert (seen.names.count("sort"), sums) == (1, [])


@pytest.mark.parametrize(
    ("capability", "experts", "grouped"),
    [((8, 0), 8, False), ((9, 0), 8, True), ((10, 3), 8, True), ((12, 0), 8, False),
     ((9, 0), 1023, True), ((9, 0), 1024, False)],
)  # fmt: skip
def test_products_are_grouped_where_torch_does_not_wait(capability, experts, grouped, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        x = torch.zeros(4, 8, dtype=torch.bfloat16, device="cuda:0")
        assert runs_grouped(x, x.new_zeros(experts, 16, 8)) is grouped
        assert not runs_grouped(x.float(), x.new_zeros(experts, 16, 8))
        assert not runs_grouped(x, x.new_zeros(experts, 12, 8))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_grouped_products_give_what_the_cpu_gives(activation, monkeypatch):
    monkeypatch.setattr("apt_plugins.moe.device_experts.runs_grouped", lambda *_: True)
    experts = experts_of(activation, dtype=torch.float32)
    x, indices, weights = inputs(experts, dtype=torch.float32)
    wanted = (x, weights, *experts.parameters())
    y = experts(x, indices, weights)
    tensors = (x, indices, weights, *tensors_of(experts), None)
    grouped = assigned_on_device(activation, *tensors, limit=None)
    torch.testing.assert_close(grouped, y, rtol=1e-4, atol=1e-4)
    for found, expected in zip(gradients(grouped, *wanted), gradients(y, *wanted), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", [None, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_is_planned_for_a_gpu_is_that_of_its_branch(dtype, limit, monkeypatch):
    number, tokens, width, hidden, top_k = 8, 40, 8, 16, 2
    half = dtype == torch.bfloat16

    def forward(as_planned, experts, x, indices, weights):
        if not as_planned:
            x, *matrices = (t.to(dtype) for t in (x, *tensors_of(experts)))
            given = (x, indices, weights, *matrices, None)
            return assigned_on_device("swiglu", *given, limit=limit)
        with GPUOperators(PLANNED_CAPABILITY), autocast(CPU, dtype if half else None):
            return experts(x, indices, weights, limit=limit)

    def parts():
        experts = Experts(number, width, hidden)
        for parameter in experts.parameters():
            parameter.grad = torch.empty_like(parameter)
        x = torch.zeros(tokens, width, requires_grad=True)
        weights = torch.zeros(tokens, top_k, requires_grad=True)
        # All are sent as many.
        return experts, x, torch.arange(tokens * top_k).view(tokens, top_k) % number, weights

    def peak(as_planned):
        given = parts()
        with CountedAllocations() as counted:
            forward(as_planned, *given).sum().backward()
        return counted.peak

    with FakeTensorMode():
        planned, given = peak(True), parts()
        own = {t.untyped_storage() for t in (*given[1:], *given[0].parameters())}
        saved = {}

        def keep(tensor):
            if tensor.untyped_storage() not in own:
                saved[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward(True, *given)
    monkeypatch.setattr("apt_plugins.moe.device_experts.runs_grouped", lambda *_: half)
    assert planned == pytest.approx(peak(False), rel=1e-3)

    rows, size = top_k * tokens, dtype.itemsize
    # The rows, the products with gate and up, SiLU, and the hidden units without and with weights.
    by_hand = size * rows * (width + 5 * hidden)
    if half:
        by_hand += size * 3 * number * width * hidden
    elif limit is not None:  # the places of the products with gate, up and down
        by_hand += size * number * limit * (2 * width + hidden)
    few = 8 * rows * 6  # the order, the places, what each row is multiplied by
    assert by_hand < sum(saved.values()) < by_hand + few < planned


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("limit", [None, 11])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gpu_gives_what_the_cpu_gives(activation, limit, dtype, tolerance):
    """In bf16 the products are grouped, or in turns on older GPUs; in fp32 in turns or padded."""
    experts = experts_of(activation, dtype=torch.float32)
    x, indices, weights = inputs(experts, dtype=torch.float32)
    wanted = (x, weights, *experts.parameters())
    y = experts(x, indices, weights)
    expected = (y, *gradients(y, *wanted))
    tensors = [t if t is None else t.to("cuda", dtype) for t in (x, weights, *tensors_of(experts))]
    there = [t if t is None else t.detach().requires_grad_() for t in tensors]
    x, weights, *parameters = there
    found = assigned_on_device(
        activation, x, indices.cuda(), weights, *parameters, None, limit=limit
    )
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(found)
    asked = [t for t in there if t is not None]
    results = (found, *torch.autograd.grad(found, asked, upstream))
    for one, other in zip(results, expected, strict=True):
        assert (one.float().cpu() - other).norm() <= tolerance * other.norm()


def test_autocast_computes_in_bf16_and_keeps_gradients_in_fp32():
    experts = experts_of(dtype=torch.float32)
    x, indices, weights = inputs(experts, tokens=60, dtype=torch.float32)
    wanted = (x, weights, *experts.parameters())
    expected = experts(x, indices, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts(x, indices, weights)
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.01 * expected.norm()
    for found, other in zip(gradients(y, *wanted), gradients(expected, *wanted), strict=True):
        assert found.dtype == torch.float32
        assert (found - other).norm() < 0.02 * other.norm()


def test_dropout_scales_the_hidden_units_that_are_left():
    experts = experts_of()
    x, indices, weights = inputs(experts)
    torch.manual_seed(0)
    factors = torch.nn.functional.dropout(x.new_ones(indices.numel(), 16), 0.5)
    torch.manual_seed(0)
    y = experts(x, indices, weights, dropout=0.5)
    tensors = (x, indices, weights, *tensors_of(experts))
    expected = assigned_on_device("swiglu", *tensors, factors, limit=None)
    torch.testing.assert_close(y, expected)
    wanted = (x, weights, *experts.parameters())
    for found, other in zip(gradients(y, *wanted), gradients(expected, *wanted), strict=True):
        torch.testing.assert_close(found, other)


def test_there_is_no_second_derivative_and_it_says_so():
    experts = experts_of()
    x, indices, weights = inputs(experts)
    (d_x,) = torch.autograd.grad(experts(x, indices, weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backward through apt_moe\.backward"):
        torch.autograd.grad(d_x.sum(), x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_shapes_are_known_without_numbers(activation):
    experts = experts_of(activation, dtype=torch.float32)
    x, indices, weights = inputs(experts, dtype=torch.float32)
    wanted = (x, weights, *experts.parameters())
    y = experts(x, indices, weights)
    expected = [tensor.shape for tensor in (y, *gradients(y, *wanted))]
    with FakeTensorMode() as mode:
        fake = Experts(5, 8, 16, activation)
        x, indices, weights = map(mode.from_tensor, (x, indices, weights))
        y = fake(x, indices, weights)
        found = (y, *torch.autograd.grad(y.sum(), (x, weights, *fake.parameters())))
    assert [tensor.shape for tensor in found] == expected
    assert all(tensor.dtype == torch.float32 for tensor in found)


@pytest.mark.parametrize(
    ("operator", "activation"), [(o, a) for o in ("forward", "backward") for a in ACTIVATIONS]
)
def test_the_operators_keep_their_word_to_the_compiler(operator, activation):
    experts = experts_of(activation)
    x, indices, weights = inputs(experts)
    given = [t.detach() for t in (x, indices, weights)]
    parameters = [t if t is None else t.detach() for t in tensors_of(experts)]
    arguments = (activation, *given, *parameters, None)
    if operator == "backward":
        _, *kept = torch.ops.apt_moe.forward(*arguments)
        arguments = (activation, given[0], given[0], given[2], *parameters, None, *kept)
    torch.library.opcheck(
        getattr(torch.ops.apt_moe, operator), arguments, test_utils=("test_schema",)
    )
    real = getattr(torch.ops.apt_moe, operator)(*arguments)
    with FakeTensorMode() as mode:
        fake = getattr(torch.ops.apt_moe, operator)(
            *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments)
        )
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_sizes_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match=r"model\.moe\.experts"):
        Experts(0, 8, 16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_threads_compute_what_one_does(activation):
    experts = experts_of(activation)
    x, indices, weights = inputs(experts, tokens=40)
    wanted = (x, weights, *experts.parameters())
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = experts(x, indices, weights)
        found.append((y, *gradients(y, *wanted)))
    torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
