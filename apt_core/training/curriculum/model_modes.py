"""Keeps the modes of a model over a resume and a switch: which parameters are frozen
(``requires_grad`` is False) and which modules are in eval mode."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from apt_core.modeling.trainable import Change
from apt_core.modeling.transforms import ModelTransform
from apt_core.runs.run_state import Modes
from apt_core.torch_state import set_modes

log = logging.getLogger("apt.training")

PARAMETER, MODULE = "parameter ", "module "
"""Prefixes of the names of parameters and modules."""


def modes_of(model: nn.Module) -> dict[str, bool]:
    """Whether each parameter has ``requires_grad``, and whether each module is in training mode."""
    return {
        **{f"{PARAMETER}{name}": p.requires_grad for name, p in model.named_parameters()},
        **{f"{MODULE}{name}": module.training for name, module in model.named_modules()},
    }


class ModelModes:
    """Restores the modes of a checkpoint in a resumed run.

    A resumed run calls the hooks that begin a run again, and they set the modes of the start again.
    A mode that they set as they did ``at_start`` is therefore replaced by the checkpoint's; one
    that they set differently is kept. So a plugin that has thawed a parameter in mid-run need not
    know of the resume, and a plugin added at the resume can freeze one. What stages of the
    trainable set have frozen or thawed is restored before these hooks: a resumed run does not
    repeat them.
    """

    def __init__(self) -> None:
        self.at_start: dict[str, bool] = {}
        self._saved: dict[str, bool] | None = None
        self._staged: dict[str, None] = {}

    def started(self, model: nn.Module) -> None:
        """Set the modes, after the hooks that begin the run were called."""
        modes = modes_of(model)
        saved, self._saved = self._saved, None
        if saved is None:
            self.at_start = modes
            return
        changed = []
        for key, mode in modes.items():
            if saved.get(key, mode) == mode:
                continue
            if self.at_start.get(key, mode) == mode:
                modes[key] = not mode
            else:
                self.at_start[key] = mode
                changed.append(key)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(modes[f"{PARAMETER}{name}"])
        set_modes((m, modes[f"{MODULE}{name}"]) for name, m in model.named_modules())
        if changed:
            log.info("frozen or thawed, or of another mode than before: %s", ", ".join(changed))

    @property
    def staged(self) -> Collection[str]:
        """The parameters that stages of the trainable set have frozen or thawed."""
        return self._staged

    def stage(self, change: Change, model: nn.Module) -> None:
        """Make the ``change`` of a stage of the trainable set."""
        change.apply(model)
        self._staged |= dict.fromkeys([*change.frozen, *change.thawed])

    def restore_staged(self, model: nn.Module) -> None:
        """Freeze and thaw what stages have, as in the checkpoint, in a resumed run."""
        saved = self._saved or {}
        for name, parameter in model.named_parameters():
            if name in self._staged:
                key = f"{PARAMETER}{name}"
                parameter.requires_grad_(saved.get(key, parameter.requires_grad))

    @contextmanager
    def starting(self, model: nn.Module) -> Iterator[None]:
        """Count modes set while the context lasts as set ``at_start``: a resumed run sets them
        again before :meth:`started`."""
        before = modes_of(model)
        try:
            yield
        finally:
            after = modes_of(model).items()
            self.at_start |= {key: mode for key, mode in after if mode != before[key]}

    def carry(self, transform: ModelTransform, old: nn.Module) -> None:
        """Rename the modes for the model after ``transform``; new parameters and modules have
        none."""
        values = dict(old.named_parameters())
        sources = {
            f"{MODULE}{name}": f"{MODULE}{transform.old_name(name)}"
            for name, _ in transform.model.named_modules()
        }
        for name, _ in transform.model.named_parameters():
            origin = transform.origin(name, values)
            if origin is not None:
                sources[f"{PARAMETER}{name}"] = f"{PARAMETER}{origin.source}"
        for modes in (self.at_start, self._saved or {}):
            carried = {key: modes[source] for key, source in sources.items() if source in modes}
            modes.clear()
            modes.update(carried)
        staged = {f"{PARAMETER}{name}" for name in self._staged}
        names = (key.removeprefix(PARAMETER) for key, origin in sources.items() if origin in staged)
        self._staged = dict.fromkeys(names)

    def state(self, model: nn.Module) -> Modes:
        """The state for :meth:`load`."""
        now = modes_of(model) if self._saved is None else self._saved
        return Modes(at_start=dict(self.at_start), now=dict(now), staged=sorted(self._staged))

    def load(self, state: Modes) -> None:
        """Restore ``state``; it takes effect at :meth:`started`."""
        self.at_start, self._saved = dict(state.at_start), dict(state.now)
        self._staged = dict.fromkeys(state.staged)
