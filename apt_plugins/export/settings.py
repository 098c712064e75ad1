"""The settings of the exporters: what ``apt-export --option KEY=VALUE`` sets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ByteSize, Field

from apt_core.sections import Section


class FolderSettings(Section):
    """What folders of safetensors files have."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="The type of the weights in the files."
    )
    max_shard_size: Annotated[ByteSize, Field(ge=1024)] = Field(
        default=ByteSize(5 * 10**9),
        description="Weights go into several files where one would be larger, such as 5GB.",
    )
