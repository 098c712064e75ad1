"""Which packing a profile asks for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from apt_core.config import Config
from apt_core.data.packing.concat import ConcatWindows
from apt_core.data.packing.pieces import (
    Packed,
    PieceIndex,
    PieceWindows,
    pack_documents,
    pad_documents,
)
from apt_core.data.packing.rows import Windows
from apt_core.data.store.parts import TokenPart


def packing_of(config: Config, *, marked: bool) -> str:
    """The packing of data in which something, if ``marked``, is not to be learned."""
    data = config.data
    if data.packing is not None:
        return data.packing
    if data.pads:
        return "pad"
    return "documents" if marked else "concat"


def windows_of(
    part: TokenPart, config: Config, pad: int | None, folder: Path | None = None
) -> Windows:
    """The windows of ``part`` as the profile packs it; ``pad`` is the id that fills. What has to be
    computed of all documents is kept in ``folder``, which belongs to the part."""
    packing, seq_len = packing_of(config, marked=part.marked), config.seq_len
    if packing == "concat":
        return ConcatWindows(part, seq_len)
    cut = packing == "pad" and bool(config.data.truncation)

    def blocks() -> Iterator[Packed]:
        if packing == "documents":
            return pack_documents(part, seq_len)
        return pad_documents(part, seq_len, truncation=cut)

    name = f"{packing}{'-cut' if cut else ''}-{seq_len}"
    index = PieceIndex.of(blocks()) if folder is None else PieceIndex.kept_in(folder / name, blocks)
    return PieceWindows(part, seq_len, index, packed=packing == "documents", pad=pad or 0)
