"""Which packing a profile asks for."""

from __future__ import annotations

from apt_core.config import Config
from apt_core.data.packing.concat import ConcatWindows
from apt_core.data.packing.pieces import PieceIndex, PieceWindows, pack_documents, pad_documents
from apt_core.data.packing.rows import Windows
from apt_core.data.store.parts import TokenPart


def packing_of(config: Config, *, marked: bool) -> str:
    """The packing of data in which something, if ``marked``, is not to be learned."""
    data = config.data
    if data.packing is not None:
        return data.packing
    if data.padding in (True, "max_length", "longest"):
        return "pad"
    return "documents" if marked else "concat"


def windows_of(part: TokenPart, config: Config, pad: int | None) -> Windows:
    """The windows of ``part`` as the profile packs it; ``pad`` is the id that fills."""
    packing, seq_len = packing_of(config, marked=part.marked), config.seq_len
    if packing == "concat":
        return ConcatWindows(part, seq_len)
    if packing == "documents":
        blocks = pack_documents(part, seq_len)
    else:
        blocks = pad_documents(part, seq_len, truncation=bool(config.data.truncation))
    return PieceWindows(
        part, seq_len, PieceIndex.of(blocks), packed=packing == "documents", pad=pad or 0
    )
