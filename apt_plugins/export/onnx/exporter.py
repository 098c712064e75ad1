"""``exporter:onnx``: a folder for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from apt_core import Problem, __version__
from apt_core.providers import (
    ExporterProvider,
    ExportJob,
    PlainModel,
    PlainShape,
    Proof,
    TokenizerProvider,
)
from apt_plugins.export.hf import write_configuration
from apt_plugins.export.onnx.graph import DecoderGraph, WeightFile, rope_tables, write_block
from apt_plugins.export.settings import EXTRAS
from apt_plugins.export.tokenizers import expressed

WITH_CACHES = "model.onnx"
WITHOUT_CACHES = "model_without_past.onnx"
TENSORS = "model.onnx_data"
"""As Optimum names them."""

TOLERANCE = 1e-4
SCRIPT = Path(__file__).parents[1] / "proofs" / "with_onnxruntime.py"


class ONNXExporter(ExporterProvider):
    """``exporter:onnx``: ``model.onnx`` decodes with caches, ``model_without_past.onnx`` without;
    both read their tensors, fp32, from ``model.onnx_data``. Tokenizer and configuration are those
    of a Hugging Face folder."""

    name = "onnx"
    version = "1.0.0"

    def check(self, shape: PlainShape, tokenizer: TokenizerProvider) -> Iterator[Problem]:
        try:
            expressed(tokenizer)
        except ValueError as error:
            yield Problem(str(error), "data.tokenizer_name")

    def write(self, job: ExportJob) -> None:
        write_configuration(job, "float32")
        write_graphs(job.model, job.folder, job.advance)

    def usage(self, folder: str) -> str:
        return (
            f"`{WITH_CACHES}` goes on from caches (`past_key_values.*`, at first of length 0), "
            f"`{WITHOUT_CACHES}` reads whole texts: "
            "https://apt-kernel.readthedocs.io has a program that generates, under Export."
        )

    @property
    def proof(self) -> Proof:
        requires = ("onnxruntime>=1.20", "onnx>=1.16", "tokenizers>=0.21", "jinja2>=3.1")
        files = {"with_caches": WITH_CACHES, "without_caches": WITHOUT_CACHES, "tensors": TENSORS}
        extra = EXTRAS["onnx"]
        return Proof("onnxruntime", SCRIPT, requires, TOLERANCE, extra=extra, settings=files)


def write_graphs(
    model: PlainModel, folder: Path, advance: Callable[[str], None] = lambda what: None
) -> None:
    """Write both graphs of ``model`` and the tensors that they share into ``folder``, a block at a
    time. Raises OSError."""
    graphs = {
        WITH_CACHES: DecoderGraph(model.shape, caches=True),
        WITHOUT_CACHES: DecoderGraph(model.shape, caches=False),
    }
    shape = model.shape
    with open(folder / TENSORS, "xb") as file:
        weights = WeightFile(file, TENSORS)
        advance("embedding")
        embedding = weights.add("embedding", model.embedding)
        cos, sin = rope_tables(shape.head_dim, shape.rope, shape.max_seq_len)
        start = (embedding, weights.add("rope.cos", cos), weights.add("rope.sin", sin))
        streams = {name: graph.begin(*start) for name, graph in graphs.items()}
        for index, block in enumerate(model.blocks()):
            advance(f"block {index + 1} of {shape.num_layers}")
            names = write_block(weights, index, block)
            for name, graph in graphs.items():
                streams[name] = graph.block(index, streams[name], block, names)
        final_norm = weights.add("final_norm", model.final_norm.weight)
        head = embedding if model.head is None else weights.add("head", model.head)
    for name, graph in graphs.items():
        graph.end(streams[name], final_norm, head)
        content = graph.proto(weights, __version__).SerializeToString()
        (folder / name).write_bytes(content)
