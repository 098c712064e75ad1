"""ONNX graphs of the plain form of a model, written a block at a time.

Legend: B batch, T new tokens, S all tokens with those of the caches, D d_model, H query heads,
K key and value heads, R head width, E experts, N = B*T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from apt_core.modeling.layers.rope import rotary_frequencies
from apt_core.providers.plain import (
    PlainAttention,
    PlainBlock,
    PlainExperts,
    PlainFFN,
    PlainRope,
    PlainRouter,
    PlainShape,
)

OPSET, IR_VERSION = 18, 8
"""Old ones, since everything is expressible in them: more runtimes read them."""

ALIGNMENT = 4096
"""Of each tensor in the data file, so that runtimes can map it into memory."""

HIDDEN = -1e30
"""Added to the score of a token that is not to be seen: any other score vanishes beside it, and a
query that sees nothing at all has finite outputs nevertheless."""


class WeightFile:
    """The tensors of graphs, in a file beside these; ``tensors`` refer to it by ``location``."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self._file, self._location = file, location
        self.tensors: list[TensorProto] = []

    def add(self, name: str, values: Tensor) -> str:
        """Write ``values`` as fp32; returns ``name``."""
        array = np.ascontiguousarray(values.numpy(), dtype="<f4")
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        start, size = self._file.tell(), array.nbytes
        self._file.write(array.data)
        tensor = TensorProto(
            name=name,
            data_type=TensorProto.FLOAT,
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        fields = {"location": self._location, "offset": start, "length": size}
        for key, value in fields.items():
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)
        return name


class Nodes:
    """The nodes of a graph. Names of values begin with a prefix that says where they belong."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[Any, ...], TensorProto] = {}
        self._names: dict[str, int] = {}
        self.prefix = ""

    def add(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add a node of one output; returns the name of this: ``name``, or one of its own."""
        return self.several(kind, *inputs, names=[name or self._named(kind)], **attributes)[0]

    def several(
        self, kind: str, *inputs: str, names: Sequence[str] | int, **attributes: Any
    ) -> list[str]:
        """Add a node with outputs of these ``names``, or of so many of its own."""
        if isinstance(names, int):
            names = [self._named(kind) for _ in range(names)]
        self._nodes.append(
            helper.make_node(kind, list(inputs), list(names), name=names[0], **attributes)
        )
        return list(names)

    def constant(self, value: Any, dtype: str = "int64") -> str:
        """A small constant: the same name for the same value."""
        array = np.asarray(value, dtype=dtype)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant.{len(self._constants)}"
            self._constants[key] = numpy_helper.from_array(array, name)
        return self._constants[key].name

    def _named(self, kind: str) -> str:
        name = f"{self.prefix}{kind}"
        self._names[name] = count = self._names.get(name, 0) + 1
        return f"{name}.{count}"

    def graph(
        self,
        name: str,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        weights: Sequence[TensorProto] = (),
    ) -> onnx.GraphProto:
        initializers = [*self._constants.values(), *weights]
        return helper.make_graph(self._nodes, name, inputs, outputs, initializers)


class DecoderGraph:
    """The graph of a decoder, with caches or without.

    Inputs ``input_ids`` int64 [B, T], ``attention_mask`` int64 [B, S] (0: padding, on either side)
    and, with caches, ``past_key_values.L.key`` and ``.value`` [B, K, S - T, R] of each layer L;
    outputs ``logits`` [B, T, V] and, with caches, ``present.L.key`` and ``.value`` [B, K, S, R].
    A token's position is the number of tokens before it that are no padding.
    """

    def __init__(self, shape: PlainShape, *, caches: bool) -> None:
        self.shape, self.caches = shape, caches
        self.nodes = Nodes()
        total = "total_sequence_length" if caches else "sequence_length"
        self._inputs = [
            _value("input_ids", TensorProto.INT64, "batch_size", "sequence_length"),
            _value("attention_mask", TensorProto.INT64, "batch_size", total),
        ]
        self._outputs: list[onnx.ValueInfoProto] = []
        self._turns: tuple[str, str] | None = None
        self._read_inputs()

    def _read_inputs(self) -> None:
        """Which places a token has and which others it sees, the same for all layers."""
        add, constant = self.nodes.add, self.nodes.constant
        zero, one = constant([0]), constant([1])
        new = add("Shape", "input_ids", start=1, end=2)
        total = add("Shape", "attention_mask", start=1, end=2)
        past = add("Sub", total, new)
        self._batch_and_new = add("Shape", "input_ids", start=0, end=2)
        is_token = add("Cast", "attention_mask", to=TensorProto.BOOL)
        counted = add("Cast", is_token, to=TensorProto.INT64)
        before = add("Sub", add("CumSum", counted, constant(1)), one)
        places = add("Max", before, zero)
        self._positions = add("Slice", places, past, total, one, name="positions")
        scalars = [add("Squeeze", value, zero) for value in (past, total)]
        keys = add("Range", constant(0), scalars[1], constant(1))
        queries = add("Unsqueeze", add("Range", *scalars, constant(1)), one)
        causal = add("LessOrEqual", keys, queries)
        seen = add("And", causal, add("Unsqueeze", is_token, constant([1, 2])))
        seen_or_not = (constant(0, "float32"), constant(HIDDEN, "float32"))
        self._added = add("Where", seen, *seen_or_not, name="attention_bias")

    def begin(self, embedding: str, cos: str, sin: str) -> str:
        """Add the embedding [V, D] and, for all layers, the rows [B, 1, T, R/2] of RoPE's tables
        [max_seq_len, R/2]; returns the first block's input."""
        add, one = self.nodes.add, self.nodes.constant([1])
        rows = [add("Gather", table, self._positions) for table in (cos, sin)]
        self._turns = (add("Unsqueeze", rows[0], one), add("Unsqueeze", rows[1], one))
        return add("Gather", embedding, "input_ids", name="embedded")

    def block(self, index: int, x: str, block: PlainBlock, weights: dict[str, str]) -> str:
        """Add block ``index`` on x [B, T, D], whose ``weights`` are these; returns its output."""
        self.nodes.prefix = f"blocks.{index}.attention."
        add = self.nodes.add
        normed = self._norm(x, weights["attention_norm"])
        x = add("Add", x, self._attention(index, normed, block.attention, weights))
        self.nodes.prefix = f"blocks.{index}.ffn."
        normed = self._norm(x, weights["ffn_norm"])
        if isinstance(block.ffn, PlainExperts):
            mixed = self._experts(normed, block.ffn.router, weights)
        else:
            mixed = self._gated(normed, weights["gate"], weights["up"], weights["down"])
        return add("Add", x, mixed, name=output_of_block(index))

    def end(self, x: str, final_norm: str, head: str) -> None:
        """Add the final norm and the logits. ``head`` [V, D] may be the embedding."""
        self.nodes.prefix = "head."
        add, constant = self.nodes.add, self.nodes.constant
        hidden = add("Reshape", self._norm(x, final_norm), constant([-1, self.shape.d_model]))
        # Not a product with the transposed matrix, of which runtimes would keep a second copy.
        flat = add("Gemm", hidden, head, transB=1)
        size = self.shape.vocab_size
        shape = add("Concat", self._batch_and_new, constant([size]), axis=0)
        add("Reshape", flat, shape, name="logits")
        logits = _value("logits", TensorProto.FLOAT, "batch_size", "sequence_length", size)
        self._outputs.insert(0, logits)

    def proto(self, weights: WeightFile, version: str) -> onnx.ModelProto:
        """The whole, whose tensors are those of ``weights``."""
        graph = self.nodes.graph("decoder", self._inputs, self._outputs, weights.tensors)
        return helper.make_model(
            graph,
            producer_name="APT",
            producer_version=version,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
        )

    def _norm(self, x: str, weight: str) -> str:
        """x / sqrt(mean(x²) + eps) * weight over the last dimension."""
        add, constant = self.nodes.add, self.nodes.constant
        mean = add("ReduceMean", add("Pow", x, constant(2, "float32")), constant([-1]), keepdims=1)
        eps = constant(self.shape.norm_eps, "float32")
        root = add("Sqrt", add("Add", mean, eps))
        return add("Mul", add("Div", x, root), weight)

    def _attention(
        self, index: int, x: str, attention: PlainAttention, weights: dict[str, str]
    ) -> str:
        add, constant = self.nodes.add, self.nodes.constant
        heads, kv_heads = attention.num_heads, attention.num_kv_heads
        width = attention.head_dim
        q = self._heads(x, weights["q"], heads, width)
        k = self._heads(x, weights["k"], kv_heads, width)
        v = self._heads(x, weights["v"], kv_heads, width)
        if attention.q_norm is not None:
            q = self._norm(q, weights["q_norm"])
        if attention.k_norm is not None:
            k = self._norm(k, weights["k_norm"])
        q, k = self._turned(q), self._turned(k)
        if self.caches:
            k = self._with_past(index, "key", k, kv_heads, width)
            v = self._with_past(index, "value", v, kv_heads, width)
        q = add("Mul", q, constant(width**-0.5, "float32"))
        # The query heads that share keys and values are rows of one product.
        q = add("Reshape", q, constant([0, kv_heads, -1, width]))
        scores = add("MatMul", q, add("Transpose", k, perm=[0, 1, 3, 2]))
        by_head = add("Reshape", scores, constant([0, heads, -1, 0]))
        shares = add("Softmax", add("Add", by_head, self._added), axis=-1)
        shares = add("Reshape", shares, add("Shape", scores))
        mixed = add("Reshape", add("MatMul", shares, v), constant([0, heads, -1, width]))
        together = add("Transpose", mixed, perm=[0, 2, 1, 3])
        flat = add("Reshape", together, constant([0, 0, heads * width]))
        return add("MatMul", flat, weights["out"])

    def _heads(self, x: str, weight: str, heads: int, width: int) -> str:
        """x [B, T, D] projected to [B, heads, T, R]."""
        add = self.nodes.add
        apart = add("Reshape", add("MatMul", x, weight), self.nodes.constant([0, 0, heads, width]))
        return add("Transpose", apart, perm=[0, 2, 1, 3])

    def _turned(self, x: str) -> str:
        """The halves a, b of x [B, heads, T, R] as a cos - b sin, b cos + a sin."""
        assert self._turns is not None
        add, (cos, sin) = self.nodes.add, self._turns
        a, b = self.nodes.several("Split", x, names=2, axis=-1, num_outputs=2)
        first = add("Sub", add("Mul", a, cos), add("Mul", b, sin))
        second = add("Add", add("Mul", b, cos), add("Mul", a, sin))
        return add("Concat", first, second, axis=-1)

    def _with_past(self, index: int, part: str, x: str, heads: int, width: int) -> str:
        past, present = f"past_key_values.{index}.{part}", f"present.{index}.{part}"
        dims = ("batch_size", heads, "past_sequence_length", width)
        self._inputs.append(_value(past, TensorProto.FLOAT, *dims))
        dims = ("batch_size", heads, "total_sequence_length", width)
        self._outputs.append(_value(present, TensorProto.FLOAT, *dims))
        return self.nodes.add("Concat", past, x, axis=2, name=present)

    def _gated(self, x: str, gate: str, up: str, down: str) -> str:
        add = self.nodes.add
        gates = add("MatMul", x, gate)
        units = add("Mul", add("Mul", gates, add("Sigmoid", gates)), add("MatMul", x, up))
        return add("MatMul", units, down)

    def _experts(self, x: str, router: PlainRouter, weights: dict[str, str]) -> str:
        """The weighted outputs of the experts that each token of x [B, T, D] chooses.

        A loop over the experts that any token chose: each computes its own tokens, whatever their
        number, so that the work grows with the experts per token and not with all experts.
        """
        add, constant = self.nodes.add, self.nodes.constant
        flat = add("Reshape", x, constant([-1, self.shape.d_model]))
        logits = add("MatMul", flat, weights["router"])
        number, renormalised = constant([router.experts_per_token]), router.renormalised
        if not renormalised:
            logits = add("Softmax", logits, axis=-1)
        shares, chosen = self.nodes.several("TopK", logits, number, names=2, axis=-1)
        if renormalised:
            shares = add("Softmax", shares, axis=-1)
        used = self.nodes.several("Unique", chosen, names=1, sorted=1)[0]
        count = add("Squeeze", add("Shape", used), constant([0]))
        nothing = add("ConstantOfShape", add("Shape", flat))
        body = self._expert(flat, chosen, shares, used, weights)
        mixed = add("Loop", count, constant(True, "bool"), nothing, body=body)
        return add("Reshape", mixed, add("Shape", x))

    def _expert(
        self, x: str, chosen: str, shares: str, used: str, weights: dict[str, str]
    ) -> onnx.GraphProto:
        """The body of the loop: adds what one expert gives to its tokens of x [N, D]."""
        inner = Nodes()
        inner.prefix = f"{self.nodes.prefix}expert."
        add, outer = inner.add, self.nodes.constant
        turn, going, total = (f"{inner.prefix}{name}" for name in ("turn", "going", "total"))
        expert = add("Gather", used, turn)
        places = add("NonZero", add("Equal", chosen, expert))
        rows = add("Gather", places, outer(0))
        own = add("Gather", x, rows)
        share = add("GatherND", shares, add("Transpose", places, perm=[1, 0]))
        gate, up, down = (add("Gather", weights[name], expert) for name in ("gate", "up", "down"))
        gates = add("Gemm", own, gate, transB=1)
        units = add("Mul", gates, add("Sigmoid", gates))
        units = add("Mul", units, add("Gemm", own, up, transB=1))
        given = add("Gemm", units, down, transB=1)
        weighted = add("Mul", given, add("Unsqueeze", share, outer([1])))
        at = add("Unsqueeze", rows, outer([1]))
        names = [f"{inner.prefix}{name}" for name in ("goes_on", "sum")]
        add("Identity", going, name=names[0])
        add("ScatterND", total, at, weighted, reduction="add", name=names[1])
        return inner.graph(
            "expert",
            [
                _value(turn, TensorProto.INT64),
                _value(going, TensorProto.BOOL),
                _value(total, TensorProto.FLOAT, None, self.shape.d_model),
            ],
            [
                _value(names[0], TensorProto.BOOL),
                _value(names[1], TensorProto.FLOAT, None, self.shape.d_model),
            ],
        )


def output_of_block(index: int) -> str:
    """The name in a graph of the residual stream [B, T, D] after block ``index``."""
    return f"blocks.{index}.output"


def rope_tables(head_dim: int, rope: PlainRope, length: int) -> tuple[Tensor, Tensor]:
    """The cosines and sines [length, R/2] by which the pairs of each position are turned."""
    frequencies, gain = rotary_frequencies(head_dim, rope.theta, rope.scaling)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return gain * angles.cos(), gain * angles.sin()


def write_block(weights: WeightFile, index: int, block: PlainBlock) -> dict[str, str]:
    """Write the tensors of ``block``; returns the names in ``weights`` of each."""
    attention, ffn = block.attention, block.ffn
    tensors = {
        "attention_norm": block.attention_norm.weight,
        # Matrices of products are transposed: the operator has no option for that.
        "q": attention.q.T,
        "k": attention.k.T,
        "v": attention.v.T,
        "out": attention.out.T,
        "ffn_norm": block.ffn_norm.weight,
    }
    if attention.q_norm is not None:
        tensors["q_norm"] = attention.q_norm.weight
    if attention.k_norm is not None:
        tensors["k_norm"] = attention.k_norm.weight
    if isinstance(ffn, PlainFFN):
        tensors |= {"gate": ffn.gate.T, "up": ffn.up.T, "down": ffn.down.T}
    else:
        tensors |= {"router": ffn.router.weight.T, "gate": ffn.gate, "up": ffn.up, "down": ffn.down}
    return {name: weights.add(f"blocks.{index}.{name}", tensor) for name, tensor in tensors.items()}


def _value(name: str, kind: int, *dims: int | str | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(dims))
