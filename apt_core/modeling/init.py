"""Initialisation of parameters, each from a generator of its own.

A parameter's initial value is a function of (seed, its qualified name, its shape) alone: adding or
removing one parameter never changes another's, and no global generator is drawn from. The rule for
a parameter is, in this order:

1. ``init_parameter(name, tensor, generator, *, num_layers) -> bool`` of the closest module around
   it that has such a method and answers True. ``name`` is relative to that module; ``tensor`` is on
   the CPU, to be filled in place.
2. The default of its own module: ``nn.Linear`` and ``nn.Embedding`` normal, biases zero, norm
   weights one.
3. ``reset_parameters()`` of its own module, run with the global generators seeded by (seed, name).
4. What the constructor gave, which :func:`construction_rng` makes a function of the seed.

A module with buffers that are computed (the tables of RoPE, say) has ``reset_buffers()``, so that a
model that was built on the meta device and then given memory is complete.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed for ``name`` under ``seed``, the same on every platform."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator seeded by (``seed``, ``name``)."""
    return torch.Generator(device="cpu").manual_seed(seed_of(seed, name))


@contextmanager
def construction_rng(seed: int, name: str) -> Iterator[None]:
    """Seed the global generators of the CPU and of CUDA while the context lasts, then restore them.

    For foreign code that draws from them, such as constructors: its result does not depend on
    earlier draws, and later draws do not depend on it. CUDA is not initialised by this; if the code
    inside does so, CUDA's generators are then seeded by ``torch.initial_seed()``.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Reading the states would initialise CUDA, and a child forked later could not use it.
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    torch_state, given = torch.get_rng_state(), torch.initial_seed()
    value = seed_of(seed, name)
    try:
        random.seed(value)
        np.random.seed(value & 0xFFFFFFFF)
        torch.default_generator.manual_seed(value)
        if torch.backends.cuda.is_built():
            torch.cuda.manual_seed_all(value)  # kept until CUDA is used, if it is not yet
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        elif torch.backends.cuda.is_built():
            torch.cuda.manual_seed_all(given)


@torch.no_grad()
def initialize_parameters(
    model: nn.Module, seed: int, *, num_layers: int = 1, only: Collection[str] | None = None
) -> None:
    """Give every parameter of ``model``, or those that ``only`` names, its initial value, in place.

    ``num_layers`` is the depth by which outputs into the residual stream are scaled down.
    Parameters on the meta device are left alone.
    """
    modules = dict(model.named_modules())
    for module in modules.values():
        reset_buffers = getattr(module, "reset_buffers", None)
        if reset_buffers is not None:
            reset_buffers()
    for name, parameter in model.named_parameters():
        if parameter.is_meta or (only is not None and name not in only):
            continue
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        value = torch.empty(parameter.shape, dtype=dtype, device="cpu")
        if _fill(modules, name, value, generator_for(seed, name), num_layers):
            parameter.copy_(value)
            continue
        owner = modules[name.rpartition(".")[0]]
        if hasattr(owner, "reset_parameters"):
            keep = {n: p.clone() for n, p in owner.named_parameters(recurse=False)}
            with construction_rng(seed, name):
                owner.reset_parameters()
            for other, other_value in keep.items():
                if other != name.rpartition(".")[2]:
                    owner.get_parameter(other).copy_(other_value)


def initial_value(
    modules: dict[str, nn.Module], name: str, shape: Sequence[int], seed: int, num_layers: int = 1
) -> Tensor:
    """The value that :func:`initialize_parameters` gives to the parameter ``name`` of ``shape``, on
    the CPU, in a model of these named ``modules``. Raises ValueError for a parameter that has no
    rule of its own."""
    value = torch.empty(shape, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        if not _fill(modules, name, value, generator_for(seed, name), num_layers):
            raise ValueError(f"no init_parameter() around {name} says what its initial values are")
    return value


def _fill(
    modules: dict[str, nn.Module],
    name: str,
    value: Tensor,
    generator: torch.Generator,
    num_layers: int,
) -> bool:
    owner_name, _, leaf = name.rpartition(".")
    prefix = owner_name
    while True:
        rule = getattr(modules[prefix], "init_parameter", None)
        relative = name[len(prefix) + 1 :] if prefix else name
        if rule is not None and rule(relative, value, generator, num_layers=num_layers):
            return True
        if not prefix:
            break
        prefix = prefix.rpartition(".")[0]
    return init_by_type(modules[owner_name], leaf, value, generator)


def init_by_type(
    module: nn.Module, leaf: str, value: Tensor, generator: torch.Generator | None
) -> bool:
    """The defaults for torch's own modules; False where there is none."""
    if isinstance(module, NORMS):
        value.fill_(1.0 if leaf == "weight" else 0.0)
    elif isinstance(module, nn.Linear):
        if leaf == "bias":
            value.zero_()
        else:
            normal_(value, module.in_features**-0.5, generator)
    elif isinstance(module, nn.Embedding):
        normal_(value, 1.0, generator)
    else:
        return False
    return True


def write_std(fan_in: int, num_layers: int) -> float:
    """The standard deviation of a matrix that writes to the stream.

    Small beside 1/sqrt(fan_in), for it meets embeddings of :func:`embedding_std`, and smaller with
    depth, so that the sum over 2 * ``num_layers`` writers does not grow.
    """
    return 0.04 * (2 * num_layers * fan_in) ** -0.5


def embedding_std(d_model: int) -> float:
    """The standard deviation of token embeddings: small, so that they learn as fast as the rest."""
    return 0.04 * d_model**-0.5


def normal_(value: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill ``value`` from a normal distribution of mean 0."""
    nn.init.normal_(value, 0.0, std, generator=generator)


def orthonormal_(value: Tensor, generator: torch.Generator | None) -> None:
    """Fill the matrix ``value`` so that its shorter side is orthonormal, uniformly distributed."""
    nn.init.orthogonal_(value, generator=generator)


def reset_layer(layer: nn.Module) -> None:
    """Initialise a layer that is used on its own, from torch's global generator as torch does.

    A layer's constructor calls this, so that a layer from a plain script is ready to train.
    """
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not parameter.is_meta:
                layer.init_parameter(name, parameter, None, num_layers=1)
