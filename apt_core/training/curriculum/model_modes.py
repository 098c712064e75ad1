"""What plugins set in a model beside its weights, over a resume and a switch: which parameters are
frozen (``requires_grad`` is False) and which modules are in eval mode."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from apt_core.modeling.transforms import ModelTransform
from apt_core.runs.run_state import Modes
from apt_core.torch_state import set_modes

log = logging.getLogger("apt.training")

PARAMETER, MODULE = "parameter ", "module "
"""Before a name, what it is of."""


def modes_of(model: nn.Module) -> dict[str, bool]:
    """Whether each parameter learns, and whether each module is in training mode."""
    return {
        **{f"{PARAMETER}{name}": p.requires_grad for name, p in model.named_parameters()},
        **{f"{MODULE}{name}": module.training for name, module in model.named_modules()},
    }


class ModelModes:
    """Lets a resumed run go on with the modes of its checkpoint.

    The hooks that begin a run are called in a resumed one too, and do once more what they did then.
    So what they make of a parameter or module counts where it differs from what they made of it
    ``at_start``, and the checkpoint's mode elsewhere: a plugin that has thawed a parameter
    meanwhile need not know of the resume, and one that came with the resume may freeze it.
    """

    def __init__(self) -> None:
        self.at_start: dict[str, bool] = {}
        self._saved: dict[str, bool] | None = None

    def started(self, model: nn.Module) -> None:
        """The hooks that begin the run were called."""
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

    @contextmanager
    def starting(self, model: nn.Module) -> Iterator[None]:
        """What is set inside, a resumed run sets again before :meth:`started`."""
        before = modes_of(model)
        try:
            yield
        finally:
            after = modes_of(model).items()
            self.at_start |= {key: mode for key, mode in after if mode != before[key]}

    def carry(self, transform: ModelTransform, old: nn.Module) -> None:
        """The names are those of the new model from now on; what it has anew was in no mode."""
        values = dict(old.named_parameters())
        sources = {f"{MODULE}{name}": f"{MODULE}{name}" for name, _ in old.named_modules()}
        for name, _ in transform.model.named_parameters():
            origin = transform.origin(name, values)
            if origin is not None:
                sources[f"{PARAMETER}{name}"] = f"{PARAMETER}{origin.source}"
        for modes in (self.at_start, self._saved or {}):
            carried = {key: modes[source] for key, source in sources.items() if source in modes}
            modes.clear()
            modes.update(carried)

    def state(self, model: nn.Module) -> Modes:
        """What a checkpoint keeps, for :meth:`load`."""
        now = modes_of(model) if self._saved is None else self._saved
        return Modes(at_start=dict(self.at_start), now=dict(now))

    def load(self, state: Modes) -> None:
        """Go on from it once the hooks that begin a run were called."""
        self.at_start, self._saved = dict(state.at_start), dict(state.now)
