"""Greedy texts by llama.cpp, with the weights of a model of APT's."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ctypes import POINTER, c_int8, c_int32
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import nn

from apt_core.modeling.plain import plain_model
from apt_plugins.export.gguf.header import architecture, turns_neighbours, write_shape
from apt_plugins.export.gguf.weights import Layout
from apt_plugins.export.proofs.with_llama_cpp import Batch, Library, Parameters


def write_gguf(model: nn.Module, path: Path) -> None:
    """Write the weights of ``model`` in F32, without a vocabulary."""
    plain = plain_model(model)
    arch = architecture(plain.shape)
    writer = gguf.GGUFWriter(path, arch)
    write_shape(writer, plain.shape)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in Layout(plain, pairs=turns_neighbours(arch)).tensors():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A GGUF in llama.cpp with its own default settings (keys and values of 16 bits, flash
    attention), for up to ``rows`` texts of ``context`` tokens at once."""

    def __init__(self, path: Path, *, threads: int, rows: int, context: int) -> None:
        self._llama = llama = Library()
        self._model = llama.load(str(path).encode(), llama.model_defaults())
        if not self._model:
            raise llama.refusal("does not load the model")
        held = bytearray(bytes(llama.context_defaults()))
        struct.pack_into("<4I", held, 0, rows * context, rows * context, 512, rows)
        self._context = llama.open(self._model, Parameters.from_buffer_copy(held))
        if not self._context:
            raise llama.refusal("does not open a context")
        llama.set_threads(self._context, threads, threads)
        self._size: int = llama.vocabulary_size(llama.vocabulary(self._model))

    def generated(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """The most likely ``tokens`` after each of prompts of one length."""
        self._llama.forget(self._llama.memory(self._context), True)
        found: list[list[int]] = [[] for _ in prompts]
        new, at = [list(ids) for ids in prompts], 0
        for _ in range(tokens):
            best = self._step(new, at)
            at, new = at + len(new[0]), [[token] for token in best]
            for text, token in zip(found, best, strict=True):
                text.append(token)
        return found

    def _step(self, texts: list[list[int]], at: int) -> list[int]:
        length, ids = len(texts[0]), [token for text in texts for token in text]
        count = len(ids)
        names = [POINTER(c_int32)(c_int32(number)) for number in range(len(texts))]
        last = range(length - 1, count, length)
        batch = Batch(
            count,
            (c_int32 * count)(*ids),
            None,
            (c_int32 * count)(*(at + place % length for place in range(count))),
            (c_int32 * count)(*[1] * count),
            (POINTER(c_int32) * count)(*(names[place // length] for place in range(count))),
            (c_int8 * count)(*(place in last for place in range(count))),
        )
        if self._llama.decode(self._context, batch):
            raise self._llama.refusal("does not compute")
        rows: list[Any] = [self._llama.logits(self._context, place) for place in last]
        return [int(np.ctypeslib.as_array(row, (self._size,)).argmax()) for row in rows]
