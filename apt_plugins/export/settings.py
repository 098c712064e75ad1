"""The settings of the exporters: what ``apt-export --option KEY=VALUE`` sets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field

from apt_core.sections import Section

EXTRAS = {"hf": "export", "onnx": "export", "gguf": "gguf", "safetensors": "data"}
"""The extras of APT that bring what writes and proves the exports of these targets."""


class FolderSettings(Section):
    """What folders of safetensors files have."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="The type of the weights in the files."
    )
    max_shard_size: Annotated[ByteSize, Field(ge=1024)] = Field(
        default=ByteSize(5 * 10**9),
        description="Weights go into several files where one would be larger, such as 5GB.",
    )


NumberFormat = Literal["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]


def _in_capitals(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


class GGUFSettings(Section):
    """What a GGUF has."""

    type: Annotated[NumberFormat, BeforeValidator(_in_capitals)] = Field(
        default="F32", description="The number format of the matrices in the file."
    )
    assume_nfc: bool = Field(
        default=False,
        description="Also write a tokenizer that brings texts to Unicode's NFC, as Qwen's do, "
        "which llama.cpp leaves to those who write them.",
    )
