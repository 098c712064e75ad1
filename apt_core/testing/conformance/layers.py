"""Checks shared by layers of several kinds, and the small layers that they check."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apt_core.modeling.init import construction_rng, generator_for, initialize_parameters
from apt_core.testing.conformance.checks import DEVICE, LeftOut, here, require_equal, require_finite

Create = Callable[[], nn.Module]
Call = Mapping[str, Any]

COMPILE_BACKEND = "aot_eager"
"""A backend that traces forward and backward but generates no code."""

AUTOCAST_ERROR = 0.05
"""Tolerance relative to the output. A bf16 value has an error of up to 0.004, and a layer is a
chain of a few products."""
AUTOCAST_GRADIENT_ERROR = 0.1


def built(create: Create, seed: int = 0) -> nn.Module:
    """A layer in eval mode, initialised by ``seed`` on the CPU as in a run, with noise added, and
    moved to the device of the check.

    The noise moves parameters away from zero and one, so that parts which a new layer does not use
    are checked too.
    """
    with construction_rng(seed, "conformance"):
        layer = create()
    assert isinstance(layer, nn.Module), f"{type(layer).__name__} is no nn.Module"
    initialize_parameters(layer, seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            fan_in = parameter.shape[-1] if parameter.ndim else 1
            size = max(parameter.square().mean().sqrt().item(), fan_in**-0.5)
            generator = generator_for(seed, f"shaken/{name}")
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * size * noise.to(parameter.dtype))
    return layer.to(DEVICE.get()).eval()


def sample(*shape: int, seed: int = 0) -> Tensor:
    """Normally distributed values, the same on any device."""
    generator = torch.Generator().manual_seed(seed)
    return here(torch.randn(shape, generator=generator))


def leaf(x: Tensor) -> Tensor:
    """A copy of ``x`` that requires a gradient, if its dtype allows it."""
    return x.clone().requires_grad_(x.is_floating_point())


def gradients(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradients of a fixed random weighted sum of ``y`` with respect to ``x`` and each
    parameter that requires one, concatenated; a single zero if none does."""
    leaves = [x] if x.requires_grad else []
    leaves += [parameter for parameter in layer.parameters() if parameter.requires_grad]
    if not leaves:
        return here(torch.zeros(1))
    found = torch.autograd.grad((y * sample(*y.shape, seed=1)).sum(), leaves, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(leaf).flatten() if grad is None else grad.flatten()
            for leaf, grad in zip(leaves, found, strict=True)
        ]
    )


def works(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output for ``x``. Asserts that the shape is kept and ``x`` is unchanged."""
    before = x.clone()
    y = layer(x)
    assert y.shape == x.shape, f"{list(x.shape)} became {list(y.shape)}"
    assert x.equal(before), "the layer changes its input in place"
    return y


def keeps_shape(layer: nn.Module, *inputs: Tensor) -> None:
    for x in inputs:
        y = works(layer, x)
        assert y.dtype == x.dtype, f"{x.dtype} became {y.dtype}"
        require_finite(y, "the output")


def share_nothing(create: Create) -> None:
    """Two layers of a provider share no parameters."""
    tensors = [
        {id(t): name for name, t in (*layer.named_parameters(), *layer.named_buffers())}
        for layer in (create(), create())
    ]
    shared = [tensors[0][key] for key in tensors[0].keys() & tensors[1].keys()]
    assert not shared, f"two layers share {', '.join(sorted(shared))}"


def has_gradients(layer: nn.Module, x: Tensor) -> None:
    """A finite gradient reaches the input and every parameter."""
    x = leaf(x)
    y = layer(x)
    wanted = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    if x.requires_grad:
        wanted = {"the input": x, **wanted}
    if wanted:
        found = torch.autograd.grad(
            (y * sample(*y.shape, seed=1)).sum(), list(wanted.values()), allow_unused=True
        )
        without = [name for name, grad in zip(wanted, found, strict=True) if grad is None]
        assert not without, f"no gradient reaches {', '.join(without)}"
        for name, grad in zip(wanted, found, strict=True):
            require_finite(grad, f"the gradient of {name}")
        assert not x.requires_grad or found[0].any(), "the gradient of the input is zero"


def deterministic(create: Create, x: Tensor) -> None:
    layer = built(create)
    assert layer(x).equal(layer(x)), "two calls with one input differ"
    with torch.no_grad():
        require_equal(layer(x), layer(x), "without gradients")
    assert built(create)(x).equal(layer(x)), "two layers of one seed differ"


def drops_nothing_in_evaluation(create: Create, dropping: Create, x: Tensor) -> None:
    require_equal(built(dropping)(x), built(create)(x), "evaluated with a dropout of 0.5", 1e-6)


def draws_by_the_seed(create: Create, x: Tensor) -> None:
    """In training the same seed gives the same output: a resume restores no other randomness."""
    layer = built(create).train()
    given = []
    for _ in range(2):
        torch.manual_seed(1)
        given.append(layer(x))
    assert given[0].equal(given[1]), (
        "two training calls with one input and one torch seed differ: it draws from a generator of "
        "its own, or counts its calls"
    )


def token_wise(layer: nn.Module, *inputs: Tensor) -> None:
    """The output at each position [b, t] depends on the input at that position only, checked by
    gradient and by value, and in training by gradient."""
    for x in inputs:
        places = ((0, 0), (1, 3), (0, x.shape[1] - 1))
        for training in (False, True):
            layer.train(training)
            given = leaf(x)
            y = layer(given)
            for row, place in places:
                (grad,) = torch.autograd.grad(
                    (y[row, place] * sample(x.shape[-1])).sum(), given, retain_graph=True
                )
                seen = (grad != 0).any(-1)
                seen[row, place] = False
                assert not seen.any(), (
                    f"the output at {[row, place]} depends on the input at "
                    f"{seen.nonzero()[0].tolist()}"
                )
        y = layer.eval()(x)
        for row, place in places:
            other = sample(*x.shape, seed=2)
            other[row, place] = x[row, place]
            what = f"the output at {[row, place]} with other inputs elsewhere"
            require_equal(layer(other)[row, place], y[row, place], what)


def rows_apart(layer: nn.Module, x: Tensor, *calls: Call) -> None:
    """No row of a batch [B, T, D] depends on another, checked by gradient and by value, also in
    training."""
    other = torch.cat([x[:1], sample(*x[1:].shape, seed=2)])
    for call in calls or ({},):
        for training in (False, True):
            layer.train(training)
            given = leaf(x)
            y = layer(given, **call)
            (grad,) = torch.autograd.grad((y[0] * sample(*x.shape[1:])).sum(), given)
            assert not grad[1:].any(), "a row of the batch depends on another"
        what = "a row of the batch beside other rows"
        require_equal(layer.eval()(other, **call)[:1], layer(x, **call)[:1], what)


def loads_state(create: Create, x: Tensor) -> None:
    layer, other = built(create), built(create, seed=1)
    other.load_state_dict(layer.state_dict(), strict=True)
    require_equal(other(x), layer(x), "after loading the state of another layer", 1e-6)
    if not x.is_floating_point():
        return
    for _ in range(3):
        layer.train()(x)
    other = built(create, seed=1)
    other.load_state_dict(layer.state_dict(), strict=True)
    for each in (layer, other):
        each.train()
    require_equal(other(x), layer(x), "after three training calls, and loading the state", 1e-6)


def builds_on_meta(create: Create, x: Tensor) -> None:
    """A layer built on the meta device allocates nothing, and works after ``reset_buffers`` and
    loading a state."""
    with torch.device("meta"), construction_rng(0, "conformance"):
        layer = create()
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    held = [name for name, tensor in tensors.items() if not tensor.is_meta]
    assert not held, f"built on the meta device, {', '.join(held)} is allocated"
    layer.to_empty(device=DEVICE.get()).eval()
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    for module in layer.modules():
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()
    whole = built(create)
    layer.load_state_dict(whole.state_dict())
    require_equal(
        layer(x), whole(x), "built on the meta device and given memory (is there reset_buffers?)"
    )


def autocasts(layer: nn.Module, x: Tensor, *calls: Call) -> None:
    """Output and gradients under bf16 autocast are close to those of fp32."""
    for call in calls or ({},):
        given, cast = leaf(x), leaf(x)
        wide = layer(given, **call)
        with torch.autocast(x.device.type, torch.bfloat16):
            y = layer(cast, **call)
        assert y.is_floating_point(), f"the output is {y.dtype}"
        require_near(y.float(), wide, "the output", AUTOCAST_ERROR)
        gradient, expected = gradients(layer, cast, y.float()), gradients(layer, given, wide)
        require_near(gradient, expected, "the gradient", AUTOCAST_GRADIENT_ERROR)


def require_near(given: Tensor, expected: Tensor, what: str, bound: float) -> None:
    """AssertionError unless the error, root mean square, is within ``bound`` of the value's."""
    require_finite(given, f"{what} under bf16 autocast")
    error = ((given - expected).norm() / expected.norm()).item()
    assert error <= bound, f"{what} is off by {error:.1%} under bf16 autocast (at most {bound:.0%})"


def compiles(layer: nn.Module, x: Tensor, *calls: Call) -> None:
    """torch.compile finds no graph break at any length, and compiled outputs and gradients are the
    same."""
    # Earlier compilations would count towards the recompile limit of shared code.
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=COMPILE_BACKEND)
    for call in calls or ({},):
        given = leaf(x)
        y, expected = compiled(given, **call), layer(given, **call)
        require_equal(y, expected, "compiled")
        gradient = gradients(layer, given, y)
        require_equal(gradient, gradients(layer, given, expected), "compiled, the gradient")
    for shorter in (x[:, :-2], x[:, :-3]) if x.ndim > 1 else ():
        require_equal(compiled(shorter), layer(shorter), "compiled, with other lengths")


def never_waits(layer: nn.Module, x: Tensor, *calls: Call) -> None:
    """Forward, backward and decoding run on tensors that have no values."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    cache = layer.create_cache(x.shape[1]) if hasattr(layer, "create_cache") else None
    try:
        with mode:
            for call in calls or ({},):
                fake = {k: mode.from_tensor(v) for k, v in call.items()}
                for training in (False, True):
                    layer.train(training)
                    given = mode.from_tensor(leaf(x))
                    gradients(layer, given, layer(given, **fake))
            if cache is not None:
                with torch.no_grad():
                    given = mode.from_tensor(x)
                    layer.eval()(given[:, :-1], cache=cache)
                    layer(given[:, -1:], cache=cache)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise AssertionError(
            f"reads values of a tensor on the host ({error}): no .item(), no bool(tensor) and no "
            "shape that depends on values in a forward"
        ) from error


def costs(provider: Any, flops: Callable[[int], int]) -> None:
    """``provider.flops`` is a number of operations that grows with the sequence."""
    if not hasattr(provider, "flops"):
        raise LeftOut("the provider does not tell its flops")
    few, many = flops(8), flops(64)
    assert isinstance(few, int) and isinstance(many, int), "flops is no int"
    assert 0 < few < many, f"{few} operations for 8 tokens, {many} for 64"


def same_weights(layer: nn.Module, other: nn.Module) -> nn.Module:
    """``other`` with the parameters of ``layer`` that it also has."""
    other.load_state_dict(copy.deepcopy(layer.state_dict()), strict=False)
    return other
