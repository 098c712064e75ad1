"""Compiles functions of one new token: a token of a small model waits less for its arithmetic than
for the calls of some forty small operations a layer, which the compiler makes two calls of.

torch.compile checks in every call whether its assumptions still hold, which takes as long as a
layer; here the functions are traced once, and compiled ahead with their weights as inputs, so that
layers of the same shape share what is compiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from apt_core.log import get_logger
from apt_core.modeling.row_decoding import MOST_COPIED, LargePages, RowStep

log = get_logger("apt.modeling")

Compiled = Callable[..., Sequence[Tensor]]

NONE: Mapping[int, int] = MappingProxyType({})


class Compiler:
    """Compiles functions of tensors on the CPU that give tensors, and keeps what it has compiled: a
    function that differs from an earlier one in its weights alone takes no time."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}
        self._blocks = Blocks()

    def forget_weights(self) -> None:
        """Make room for copies of other weights: functions with the former ones are not called any
        more."""
        self._blocks = Blocks()

    def compiled(
        self, function: Compiled, *examples: Tensor, varying: Mapping[int, int] = NONE
    ) -> Compiled:
        """``function`` for inputs like ``examples``. What it computes may depend on these and on
        the tensors that it holds, but on their shapes alone whether and how. Of the inputs that
        ``varying`` has the numbers of, the dimension that it gives is of any length of at least 2,
        the same for all.

        Raises what torch's compiler raises, which needs a C++ compiler.
        """
        graph, weights = _traced(function, examples, self._blocks)
        inputs = (*examples, *weights)
        shapes = ((x.shape, x.stride()) for x in inputs)
        key = graph.code, torch.get_num_threads(), *varying.items(), *shapes
        if key not in self._made:
            if not self._made:
                # What goes to a terminal are warnings, and it stands still for a while.
                log.warning("compiling what a token is computed by, which takes 10 to 30 seconds")
            self._made[key] = _loaded(graph, inputs, varying)
        run = self._made[key].boxed_run

        def call(*given: Tensor) -> Sequence[Tensor]:
            found: Sequence[Tensor] = run([*given, *weights])
            return found

        return call


Part = Callable[[Tensor, Tensor, RowStep], Sequence[Tensor]]
"""A part of what computes one token. It takes the state x [1, D], the token's numbers int64 [2, 1],
which are its id and its place, and the step. It returns x, or the last part the logits and what is
read of them. The first part gets the numbers in the place of x."""


@dataclass(frozen=True)
class CompiledToken:
    """Computes the one token of a step, with ``number`` compiled blocks."""

    parts: Sequence[Part]
    number: int

    def __call__(self, numbers: Tensor, step: RowStep) -> tuple[Tensor, Tensor]:
        """The logits [1, V] after the token whose id and place are ``numbers`` int64 [2, 1], and
        what :func:`~apt_core.modeling.row_decoding.likeliest` gives of them."""
        found: Sequence[Tensor] = (numbers,)
        for part in self.parts:
            found = part(found[0], numbers, step)
        logits, likely = found
        return logits, likely


def _traced(
    function: Compiled, examples: Sequence[Tensor], blocks: Blocks
) -> tuple[GraphModule, list[Tensor]]:
    """The operations of ``function``, and the tensors that it holds, which are inputs too."""
    from torch.fx.experimental.proxy_tensor import make_fx

    # Without values: a function that looks at them fails.
    trace = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)
    traced: GraphModule = trace(*examples)
    graph, weights = traced.graph, list[Tensor]()
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.bmm.default:
            blocks.read_by(traced, node)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    names: dict[str, Any] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        if node.users and node.target not in names:
            weights.append(getattr(traced, node.target))
            with graph.inserting_after(last):
                last = names[node.target] = graph.placeholder(f"weight_{len(names)}")
        if node.users:
            node.replace_all_uses_with(names[node.target])
        graph.erase_node(node)
    return GraphModule(torch.nn.Module(), graph), weights


class Blocks:
    """Copies of weights [F, D] as [F/L, D, L], for L numbers in a register, up to MOST_COPIED bytes
    in all. The compiler's loops over a copy read it from beginning to end, a register at a time.
    torch's own products reach .9 of that speed, and the compiler's loops over [F, D] .7."""

    def __init__(self) -> None:
        self._pages, self._room = LargePages(), MOST_COPIED
        self._lanes = 16 if "512" in torch.backends.cpu.get_cpu_capability() else 8

    def read_by(self, traced: GraphModule, node: Node) -> None:
        """Have ``node``, the product of a held weight [2, F/2, D] with two equal columns [2, D, 1],
        read a copy in blocks, if there is room for it and F is a multiple of L."""
        aten, graph = torch.ops.aten, traced.graph
        weight, columns = node.args
        assert isinstance(weight, Node) and isinstance(columns, Node)
        held = getattr(traced, str(weight.target)) if weight.op == "get_attr" else None
        if held is None or held.shape[:2].numel() % self._lanes or held.nbytes > self._room:
            return
        self._room -= held.nbytes
        copy = self._pages.copy(held.flatten(0, 1).unflatten(0, (-1, self._lanes)).transpose(1, 2))
        traced.register_buffer(f"{weight.target}_blocks", copy, persistent=False)
        with graph.inserting_before(node):
            blocks = graph.get_attr(f"{weight.target}_blocks")
            x = graph.call_function(aten.select.int, (columns, 0, 0))
            products = graph.call_function(aten.mul.Tensor, (blocks, x))
            sums = graph.call_function(aten.sum.dim_IntList, (products, [1]))
            found = graph.call_function(aten.view.default, (sums, [*held.shape[:2], 1]))
        node.replace_all_uses_with(found)
        graph.erase_node(node)


def _loaded(graph: GraphModule, inputs: tuple[Tensor, ...], varying: Mapping[int, int]) -> Any:
    """``graph`` compiled for ``inputs``."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of pytrees
        package = str(Path(folder, "decoding.pt2"))
        length = torch.export.Dim("length", min=2, max=2**30)
        shapes = tuple({varying[n]: length} if n in varying else None for n in range(len(inputs)))
        exported = torch.export.export(graph, inputs, dynamic_shapes=shapes)
        aoti_compile_and_package(exported, package_path=package)
        return aoti_load_package(package).loader
