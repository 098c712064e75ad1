"""The tensors of a GGUF: names, layouts and number formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from apt_core.modeling.layers.rope import rotary_frequencies
from apt_core.providers import PlainBlock, PlainExperts, PlainModel, PlainRope

Array = npt.NDArray[Any]


class Layout:
    """Names and arranges the tensors of ``model`` as llama.cpp knows them: with ``pairs`` for an
    architecture whose RoPE turns neighbours."""

    def __init__(self, model: PlainModel, *, pairs: bool) -> None:
        self._model, self._pairs = model, pairs

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes of all tensors, in the order of :meth:`tensors`."""
        named = ((name, tuple(tensor.shape)) for name, tensor in self._outside())
        yield from named
        of_block = [(name, tuple(tensor.shape)) for name, tensor in self._block(0)]
        for number in range(self._model.shape.num_layers):
            yield from ((f"blk.{number}.{name}", shape) for name, shape in of_block)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors by their names, one block at a time."""
        yield from self._outside()
        for number in range(self._model.shape.num_layers):
            yield from ((f"blk.{number}.{name}", tensor) for name, tensor in self._block(number))

    def _outside(self) -> Iterator[tuple[str, Tensor]]:
        model = self._model
        yield "token_embd.weight", model.embedding
        yield "output_norm.weight", model.final_norm.weight
        if model.head is not None:
            yield "output.weight", model.head
        factors = frequency_divisors(model.shape.rope, model.shape.head_dim)
        if factors is not None:
            yield "rope_freqs.weight", factors

    def _block(self, number: int) -> list[tuple[str, Tensor]]:
        block = self._model.block(number)
        attention, ffn = block.attention, block.ffn
        q, k = attention.q, attention.k
        if self._pairs:
            q, k = in_pairs(q, attention.num_heads), in_pairs(k, attention.num_kv_heads)
        found = {
            "attn_norm": block.attention_norm.weight,
            "attn_q": q,
            "attn_k": k,
            "attn_v": attention.v,
            "attn_output": attention.out,
        }
        if attention.q_norm is not None and attention.k_norm is not None:
            found["attn_q_norm"] = attention.q_norm.weight
            found["attn_k_norm"] = attention.k_norm.weight
        found["ffn_norm"] = block.ffn_norm.weight
        experts = isinstance(ffn, PlainExperts)
        if isinstance(ffn, PlainExperts):
            found["ffn_gate_inp"] = ffn.router.weight
        for name, weight in (("gate", ffn.gate), ("up", ffn.up), ("down", ffn.down)):
            found[f"ffn_{name}_exps" if experts else f"ffn_{name}"] = weight
        return [(f"{name}.weight", tensor) for name, tensor in found.items()]


def in_pairs(weight: Tensor, heads: int) -> Tensor:
    """The rows of ``weight`` [heads*R, D], of which RoPE turns row i and row i + R/2 of a head
    together, in the order in which it turns rows 2i and 2i + 1."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def frequency_divisors(rope: PlainRope, width: int) -> Tensor | None:
    """What llama.cpp divides RoPE's frequencies by [R/2], where they are not those of a rule that
    it knows by name."""
    if rope.scaling is None or rope.scaling.type != "llama3":
        return None
    kept, _ = rotary_frequencies(width, rope.theta)
    scaled, _ = rotary_frequencies(width, rope.theta, rope.scaling)
    return (kept / scaled).float()


def type_of(name: str, shape: tuple[int, ...], wanted: Type) -> Type:
    """The number format of a tensor of a file that is mostly of type ``wanted``.

    Norms and routers stay F32. Embedding and head of a 4 or 5 bit file are Q8_0, since they bear it
    least. What has rows that are not made of whole blocks stays F16.
    """
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return Type.F32
    if wanted.name[:2] in ("Q4", "Q5") and name in ("token_embd.weight", "output.weight"):
        wanted = Type.Q8_0
    return wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else Type.F16


def stored(name: str, tensor: Tensor, wanted: Type) -> Array:
    """``tensor`` as the file has it."""
    array = np.ascontiguousarray(tensor.detach().numpy(), dtype=np.float32)
    return gguf.quantize(array, type_of(name, array.shape, wanted))


def rounded(model: PlainModel, wanted: Type) -> PlainModel:
    """``model`` with the weights that a file of type ``wanted`` holds."""

    def held(name: str, tensor: Tensor) -> Tensor:
        kind = type_of(name, tuple(tensor.shape), wanted)
        found = gguf.dequantize(stored(name, tensor, wanted), kind)
        return torch.from_numpy(np.array(found, dtype=np.float32)).reshape(tensor.shape)

    def block(number: int) -> PlainBlock:
        return _rounded_block(model.block(number), held)

    return replace(
        model,
        embedding=held("token_embd.weight", model.embedding),
        head=None if model.head is None else held("output.weight", model.head),
        block=block,
    )


def _rounded_block(block: PlainBlock, held: Callable[[str, Tensor], Tensor]) -> PlainBlock:
    attention, ffn = block.attention, block.ffn
    matrices = {name: held(name, getattr(attention, name)) for name in ("q", "k", "v", "out")}
    weights = {name: held(name, getattr(ffn, name)) for name in ("gate", "up", "down")}
    return replace(block, attention=replace(attention, **matrices), ffn=replace(ffn, **weights))
