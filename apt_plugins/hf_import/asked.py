"""What is asked of an import, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

from apt_core.config import Override


@dataclass(frozen=True)
class Asked:
    """What is to be made of ``folder``: a run in ``output`` with the data and the training of
    ``profile``, by default of none but defaults. ``tokenizer`` is one that is not in the folder,
    ``rank`` that of TVA, if the attention is to become that, and ``heal_steps`` how long it then
    trains."""

    folder: Path
    output: Path
    profile: str = ""
    plugins: Sequence[str] = ()
    overrides: Sequence[Override] = ()
    tokenizer: Path | None = None
    rank: int | None = None
    heal_steps: int = 0


@dataclass
class Imported:
    """What became of it. The losses are nats per token on the held-out text of the run."""

    run: Path
    architecture: str
    notes: list[str]
    parameters: int = 0
    loss: float = nan
    to_tva: dict[str, Any] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """What the run keeps of it: ``loss`` is that of the folder's model."""
        kept: dict[str, Any] = {"loss": self.loss}
        return {**kept, "to_tva": self.to_tva} if self.to_tva else kept
