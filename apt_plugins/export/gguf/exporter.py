"""``exporter:gguf``: one file for llama.cpp and what is built on it, and a Modelfile for Ollama."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

import apt_plugins.export.proofs
from apt_core.errors import Problem
from apt_core.files import write_atomically
from apt_core.providers import (
    ExporterProvider,
    ExportJob,
    PlainModel,
    PlainShape,
    Proof,
    TokenizerProvider,
)
from apt_core.providers.base import read_settings
from apt_plugins.export.gguf.header import (
    architecture,
    ending,
    shape_problems,
    turns_neighbours,
    write_file_type,
    write_shape,
    write_vocabulary,
)
from apt_plugins.export.gguf.modelfile import modelfile
from apt_plugins.export.gguf.reading import read_vocabulary
from apt_plugins.export.gguf.vocabulary import Vocabulary
from apt_plugins.export.gguf.weights import Layout, rounded, stored, type_of
from apt_plugins.export.settings import EXTRAS, GGUFSettings
from apt_plugins.export.tokenizers import expressed

FILE = "model.gguf"

SCRIPT = Path(apt_plugins.export.proofs.__file__).parent / "with_llama_cpp.py"

TOLERANCES = {"F32": 1e-3, "F16": 2e-2, "BF16": 0.1}
"""By number format. llama.cpp rounds what it multiplies with weights: to F16 and BF16 for these, to
8 bits for all others, whose tolerance is ROUNDED. Of models with random weights and narrow
attention, 90 % of the places were within 4e-3, .03 and .1; of F32 all were within 2e-5. With heads
in the other order, they differ by .4 or more."""

ROUNDED = 0.2

SHARE = 0.9
"""Of places that are within the tolerance of a format that rounds: where two experts are as good as
each other, rounding decides between them."""


class GGUFExporter(ExporterProvider):
    """Writes ``model.gguf`` and a ``Modelfile``."""

    name = "gguf"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._settings = read_settings(GGUFSettings, config, "gguf")
        self._type = Type[self._settings.type]

    def check(self, shape: PlainShape, tokenizer: TokenizerProvider) -> Iterable[Problem]:
        yield from shape_problems(shape)
        try:
            _, problems = self._vocabulary(tokenizer, shape)
        except ValueError as error:
            problems = [str(error)]
        yield from (Problem(problem, "data.tokenizer_name") for problem in problems)
        if ending(tokenizer.special) is None:
            yield Problem(
                "the tokenizer has no token that ends a text, and llama.cpp would take id 11 for "
                "one",
                "data.tokenizer_name",
            )

    def write(self, job: ExportJob) -> None:
        shape, tokenizer = job.model.shape, job.tokenizer
        arch = architecture(shape)
        vocabulary, problems = self._vocabulary(tokenizer, shape)
        if vocabulary is None:
            raise ValueError("; ".join(problems))
        writer = gguf.GGUFWriter(None, arch)
        writer.add_type("model")
        writer.add_name(job.name)
        write_shape(writer, shape)
        write_file_type(writer, self._settings.type)
        write_vocabulary(writer, vocabulary, tokenizer.special, job.chat_template)
        self._write_weights(writer, job, Layout(job.model, pairs=turns_neighbours(arch)))
        text = modelfile(FILE, tokenizer.special, job.chat_template, shape.max_seq_len)
        write_atomically(job.folder / "Modelfile", text)

    def _vocabulary(
        self, tokenizer: TokenizerProvider, shape: PlainShape
    ) -> tuple[Vocabulary | None, list[str]]:
        data, assume_nfc = expressed(tokenizer).data, self._settings.assume_nfc
        return read_vocabulary(data, shape.vocab_size, assume_nfc=assume_nfc)

    def _write_weights(self, writer: gguf.GGUFWriter, job: ExportJob, layout: Layout) -> None:
        for name, dims in layout.shapes():
            kind = type_of(name, dims, self._type)
            held = gguf.quant_shape_to_byte_shape(dims, kind)
            writer.add_tensor_info(name, held, np.dtype(np.uint8), int(np.prod(held)), kind)
        try:
            writer.write_header_to_file(job.folder / FILE)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in layout.tensors():
                job.advance(name)
                writer.write_tensor_data(stored(name, tensor, self._type))
        finally:
            writer.close()

    def stored(self, model: PlainModel) -> PlainModel | None:
        return None if self._type is Type.F32 else rounded(model, self._type)

    def usage(self, folder: str) -> str:
        name = shlex.quote(folder)
        return f"""```
llama-cli -m {name}/{FILE} -p "Once upon a time"
ollama create {name} -f {name}/Modelfile && ollama run {name}
```"""

    @property
    def proof(self) -> Proof:
        return Proof(
            runtime="llama.cpp",
            script=SCRIPT,
            requires=("xllamacpp>=2026.10", "numpy>=1.26"),
            tolerance=TOLERANCES.get(self._settings.type, ROUNDED),
            share=1.0 if self._type is Type.F32 else SHARE,
            normal_form="NFC" if self._settings.assume_nfc else None,
            extra=EXTRAS["gguf"],
            settings={"file": FILE},
        )
