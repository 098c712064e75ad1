"""The rank of layers that compute in a narrower space: given itself, or as a ratio."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from apt_core.types import Inactive


class Ranked:
    """What such settings share: the rank is ``rank``, by default the width of the layer // ``r``.
    ``SECTION`` is where a profile has them, ``WIDTH`` what messages call the width."""

    SECTION: ClassVar[str]
    WIDTH: ClassVar[str]

    if TYPE_CHECKING:
        r: int
        rank: int | None

    def rank_in(self, width: int) -> int:
        """The rank in ``width``: 0 where the ratio leaves none, above ``width`` where it is."""
        return width // self.r if self.rank is None else self.rank

    def rank_fault(self, width: int) -> tuple[str, str] | None:
        """What is wrong with the rank in ``width``, and the remedy."""
        rank, of = self.rank_in(width), self.WIDTH.format(width)
        if rank > width:
            return f"{rank} is more than {of}", f"choose at most {width}"
        if rank < 1:
            remedy = f"choose r from 1 to {width}, or set {self.SECTION}.rank"
            return f"a ratio of {self.r} leaves no rank of {of}", remedy
        return None

    def rank_of(self, width: int) -> int:
        """:meth:`rank_in`. Raises ValueError, naming the key, for a :meth:`rank_fault`."""
        if (fault := self.rank_fault(width)) is not None:
            key = f"{self.SECTION}.{'r' if self.rank is None else 'rank'}"
            raise ValueError(f"{key}: {': '.join(fault)}")
        return self.rank_in(width)

    def without_ratio(self) -> Iterator[Inactive]:
        """The ratio, where it has no effect beside the rank."""
        if self.rank is not None:
            key = f"{self.SECTION}.rank"
            yield Inactive(f"{self.SECTION}.r", f"{key} takes its place", (key,))
