"""A model with all that it takes to use it: what generation, evaluation and export stand on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt_core.config import Config
from apt_core.device import as_current_device, autocast, cpu_threads
from apt_core.modeling.modes import eval_mode
from apt_core.modeling.placement import num_threads
from apt_core.modeling.seeds import deterministic_kernels, fp32_products
from apt_core.plugin_manager import PluginManager
from apt_core.providers.tokenizer import TokenizerProvider
from apt_core.registry import Registry
from apt_core.runs.display import html_facts
from apt_core.schedules import Schedule


@dataclass(frozen=True)
class Position:
    """Where a run is: ``step`` optimizer steps were taken, the last of them in ``epoch`` (from 1),
    and windows of ``tokens`` positions were trained on."""

    step: int = 0
    epoch: int = 1
    tokens: int = 0


@dataclass(frozen=True, eq=False, repr=False)
class Session:
    """A run's model at a ``position``, and what belongs to it: a run that is going on makes one for
    its sample, :func:`~apt_core.runs.open_run` makes one of a run's folder.

    ``config`` is the run's profile, ``manager`` has its plugins in the states that they had there,
    ``registry`` its providers, ``schedule`` its schedules with the length of the run as far as it
    is known. ``dtype`` is the type in which the run computes by autocast, None for fp32.
    ``checkpoint`` is the folder that was opened, None in a run that is going on.
    """

    config: Config
    manager: PluginManager
    registry: Registry
    schedule: Schedule
    position: Position
    model: nn.Module
    tokenizer: TokenizerProvider
    device: torch.device
    dtype: torch.dtype | None = None
    checkpoint: Path | None = None
    kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """What users of the session make of it once and keep with it."""

    def __repr__(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self._facts().items())
        return f"<Session: {facts}>"

    def _repr_html_(self) -> str:
        return html_facts("Session", self._facts())

    def _facts(self) -> dict[str, object]:
        """What tells this session from others, in words."""
        at = self.position
        active = [r.name for r in self.manager.records.values() if r.state in ("active", "dormant")]
        facts = {
            "profile": self.config.name,
            "position": f"step {at.step:,} in epoch {at.epoch}, {at.tokens:,} tokens",
            "parameters": f"{sum(p.numel() for p in self.model.parameters()):,}",
            "device": self.device,
            "precision": str(self.dtype or torch.float32).removeprefix("torch."),
            "tokenizer": f"{type(self.tokenizer).__name__}, {self.tokenizer.vocab_size:,} ids",
            "plugins": ", ".join(active),
            "checkpoint": self.checkpoint or "",
        }
        return {name: value for name, value in facts.items() if value not in ("", None)}

    def param(self, name: str, default: Any = None) -> Any:
        """The value of a scheduled parameter in the last step that was taken (the first, where none
        was); ``default`` where the profile gives it none. Raises ValueError where the parameter
        depends on the length of the run and that is not known."""
        at = self.position
        # A step counts by the tokens before it: the steps of the run tell them.
        tokens = at.tokens if self.schedule.horizon.steps is None or not at.step else None
        return self.schedule.get_param(
            name, epoch=at.epoch, step=max(1, at.step), tokens=tokens, default=default
        )

    def tensor(self, ids: Sequence[int]) -> Tensor:
        """Token ids as the model takes them: int64 [1, T] on the device."""
        return torch.tensor([ids], dtype=torch.int64, device=self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision in which the run computes its forward."""
        return autocast(self.device, self.dtype)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The model in eval mode, without gradients, and torch as the run sets it: its CPU threads,
        TF32 and deterministic kernels, which decide about the last bits. All of it is put back."""
        with (
            as_current_device(self.device),
            cpu_threads(num_threads(self.config)),
            deterministic_kernels(self.config.training.deterministic),
            fp32_products(self.device, tf32=self.config.hardware.tf32),
            eval_mode(self.model),
            torch.no_grad(),
        ):
            yield
