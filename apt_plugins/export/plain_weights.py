"""``exporter:safetensors``: the plain form of a model as it is, for programs of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_core import Problem
from apt_core.files import write_atomically
from apt_core.providers import (
    ExporterProvider,
    ExportJob,
    PlainBlock,
    PlainExperts,
    PlainModel,
    PlainShape,
    Proof,
    TokenizerProvider,
)
from apt_core.providers.base import read_settings
from apt_plugins.export.folders import rounded, write_tensors
from apt_plugins.export.settings import EXTRAS, FolderSettings
from apt_plugins.export.tokenizers import expressed

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-5

SCRIPT = Path(__file__).with_name("proofs") / "with_torch.py"


class PlainWeightsExporter(ExporterProvider):
    """``exporter:safetensors``; settings as :class:`FolderSettings`."""

    name = "safetensors"
    version = "1.0.0"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.settings = read_settings(FolderSettings, config, "--option")

    def check(self, shape: PlainShape, tokenizer: TokenizerProvider) -> Iterator[Problem]:
        try:
            expressed(tokenizer)
        except ValueError as error:
            yield Problem(str(error), "data.tokenizer_name")

    def write(self, job: ExportJob) -> None:
        tokenizer = expressed(job.tokenizer)
        tokenizer.write(job.folder, job.model.shape.max_seq_len, job.chat_template)
        text = json.dumps(description(job.model.shape), indent=2)
        write_atomically(job.folder / "model.json", text + "\n")
        write_tensors(job.folder, named_tensors(job), self.settings)

    def stored(self, model: PlainModel) -> PlainModel | None:
        return rounded(model, self.settings)

    @property
    def proof(self) -> Proof:
        requires = ("torch>=2.13", "safetensors>=0.4.5", "tokenizers>=0.21")
        return Proof("torch", SCRIPT, requires, TOLERANCE, extra=EXTRAS["safetensors"])

    def usage(self, folder: str) -> str:
        return (
            "`model.json` has the numbers of the model, `model.safetensors` its weights by their "
            "plain names: https://apt-kernel.readthedocs.io explains both under Export."
        )


def description(shape: PlainShape) -> dict[str, Any]:
    """The content of ``model.json``."""
    from apt_core.modeling.layers.rope import rotary_frequencies

    rope = shape.rope
    frequencies, gain = rotary_frequencies(shape.head_dim, rope.theta, rope.scaling)
    numbers = {name: getattr(shape, name) for name in shape.__dataclass_fields__ if name != "rope"}
    return {**numbers, "rope": {"frequencies": frequencies.tolist(), "gain": gain}}


def named_tensors(job: ExportJob) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the model by the names of their places in the plain form."""
    model = job.model
    yield "embedding", model.embedding
    for number, block in enumerate(model.blocks()):
        job.advance(f"block {number + 1} of {model.shape.num_layers}")
        for name, tensor in _of_block(block):
            yield f"blocks.{number}.{name}", tensor
    yield "final_norm", model.final_norm.weight
    if model.head is not None:
        yield "head", model.head


def _of_block(block: PlainBlock) -> Iterator[tuple[str, Tensor]]:
    attention, ffn = block.attention, block.ffn
    yield "attention_norm", block.attention_norm.weight
    for name in ("q", "k", "v", "out"):
        yield f"attention.{name}", getattr(attention, name)
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name)
        if norm is not None:
            yield f"attention.{name}", norm.weight
    yield "ffn_norm", block.ffn_norm.weight
    if isinstance(ffn, PlainExperts):
        yield "ffn.router", ffn.router.weight
    for name in ("gate", "up", "down"):
        yield f"ffn.{name}", getattr(ffn, name)
