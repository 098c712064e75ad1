"""What a run that begins before its data is built has found of it, and when."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[int, Field(ge=0, le=2**62)]


class Look(BaseModel):
    """What a run found of its data before ``step``: windows ``start`` to before ``stop`` follow, of
    a store of which so many ``shards`` are there, with this hash, or the ``whole`` of it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    step: Number
    start: Number
    stop: Annotated[int, Field(ge=1, le=2**62)]
    shards: Number
    whole: bool
    sha256: str
