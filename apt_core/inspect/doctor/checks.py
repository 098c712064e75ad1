"""One thing that the doctor has examined."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

OK, NOTE, BROKEN = "ok", "note", "broken"
"""It works; it works in another way, or is optional and not there; it does not work."""


@dataclass(frozen=True)
class Check:
    """What was examined, its ``state`` (OK, NOTE or BROKEN), what was found, and how to mend it."""

    name: str
    state: str
    detail: str
    remedy: str = ""

    def row(self) -> dict[str, Any]:
        """The row of ``apt-hooks doctor --json``."""
        return asdict(self)


def in_gib(count: float) -> str:
    """
    >>> in_gib(9_771_050_598), in_gib(52_428_800)
    ('9.1 GiB', '50 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"
