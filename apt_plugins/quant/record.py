"""``quantisation.json``: what became of each weight, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from apt_plugins.quant.layers import Kept, Measured

RECORD = "quantisation.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Part):
    """A weight: ``bits`` and ``group`` (0: a row) it has now, what rounding made of it
    (``sqnr_db``, None where it changed nothing), its bytes in fp32 and now."""

    name: str
    shape: list[int]
    bits: int
    group: int
    sqnr_db: float | None
    bytes_before: int
    bytes_after: int


class KeptRow(_Part):
    name: str
    shape: list[int]
    reason: str


class Perplexity(_Part):
    """On the same held-out ``text``; ``low`` and ``high`` bound the difference at 95 %."""

    text: str
    before: float
    after: float
    low: float | None = None
    high: float | None = None

    @property
    def change(self) -> float:
        """How much larger it is after, as a share."""
        return self.after / self.before - 1


class Record(_Part):
    run: str
    checkpoint: str
    weights: str
    bits: int
    group: int
    written: str
    versions: dict[str, str]
    layers: list[Row]
    kept: list[KeptRow]
    layer_bytes_before: int
    layer_bytes_after: int
    file_bytes_before: int
    file_bytes_after: int
    perplexity: Perplexity | None = None

    @property
    def noise(self) -> float:
        """The smallest ratio of signal to noise among the layers, in dB."""
        return min(
            (row.sqnr_db for row in self.layers if row.sqnr_db is not None), default=math.inf
        )

    def table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        """Columns and rows for people."""
        rows: list[Sequence[Any]] = [
            (
                row.name,
                "x".join(map(str, row.shape)),
                f"{row.bits} bits, {f'groups of {row.group}' if row.group else 'rows'}",
                "exact" if row.sqnr_db is None else f"{row.sqnr_db:.1f} dB",
                f"{row.bytes_before:,}",
                f"{row.bytes_after:,}",
            )
            for row in self.layers
        ]
        rows += [
            (row.name, "x".join(map(str, row.shape)), f"stays: {row.reason}", "", size, size)
            for row in self.kept
            for size in (f"{4 * math.prod(row.shape):,}",)
        ]
        return ("weight", "shape", "kept as", "SQNR", "bytes before", "after"), rows

    def summary(self) -> str:
        """Some lines for people."""
        layers, files = (
            f"{after:,} of {before:,} bytes ({before / after:.2f} times smaller)"
            for after, before in (
                (self.layer_bytes_after, self.layer_bytes_before),
                (self.file_bytes_after, self.file_bytes_before),
            )
        )
        lines = [f"the {len(self.layers)} weights that were rounded: {layers}", f"all: {files}"]
        lines.append(f"lowest SQNR: {self.noise:.1f} dB")
        if self.perplexity is not None:
            p = self.perplexity
            lines.append(
                f"perplexity of {p.text}: {p.before:.4f} before, {p.after:.4f} after "
                f"({p.change:+.2%})"
            )
        return "\n".join(lines)


def row_of(measured: Measured) -> Row:
    return Row(
        name=measured.name,
        shape=list(measured.shape),
        bits=measured.rounding.bits,
        group=measured.rounding.group,
        sqnr_db=measured.noise if math.isfinite(measured.noise) else None,
        bytes_before=measured.bytes_before,
        bytes_after=measured.bytes_after,
    )


def kept_row_of(kept: Kept) -> KeptRow:
    return KeptRow(name=kept.name, shape=list(kept.shape), reason=kept.reason)
