"""What plugins do in a generation: logits processors and a decoder, of one request."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor

from apt_core.hook_returns import logits
from apt_core.inference.branches import Branches
from apt_core.plugin_manager import PluginManager
from apt_core.runs.session import Session
from apt_core.types import GenerationRequest

Processor = Callable[[Tensor, Tensor], Tensor]


class RequestHooks:
    """The processors and the decoder of one request, each until it fails."""

    def __init__(self, session: Session, request: GenerationRequest) -> None:
        """Ask the plugins."""
        given = {"request": request, "session": session}
        self._manager = session.manager
        self._processors = [
            _guarded(session.manager, plugin, function)
            for plugin, functions in session.manager.call_each("apt_logits_processors", **given)
            for function in functions
        ]
        self._decoder = session.manager.call_first("apt_decoder", **given)
        self._takes_branches = self._decoder is not None and _takes_branches(self._decoder[1])

    def __bool__(self) -> bool:
        """Whether any plugin takes part."""
        return bool(self._processors) or self._decoder is not None

    def processed(self, input_ids: Tensor, given: Tensor) -> Tensor:
        """The logits [V] that the processors make of those ``given`` after ``input_ids`` [1, T]."""
        for processor in self._processors:
            given = processor(input_ids, given)
        return given

    def chosen(self, input_ids: Tensor, given: Tensor, branches: Branches) -> int | None:
        """The token of the decoder, which is handed ``branches`` if it takes them; None if there is
        none, or if it leaves this token to sampling or fails."""
        if self._decoder is None:
            return None
        plugin, decoder = self._decoder

        def choose() -> tuple[int | None]:
            more = {"branches": branches} if self._takes_branches else {}
            token = decoder.choose(input_ids, given.clone(), **more)
            if token is None:
                return (None,)
            token = operator.index(token)
            if not 0 <= token < given.numel():
                raise ValueError(f"the decoder chose token {token} of {given.numel()}")
            return (token,)

        answer = self._manager.attempt(plugin, "apt_decoder", choose)
        if answer is None:
            self._decoder = None
            return None
        return answer[0]


def _takes_branches(decoder: Any) -> bool:
    """Whether a decoder's ``choose`` has a parameter ``branches``."""
    try:
        return "branches" in inspect.signature(decoder.choose).parameters
    except (TypeError, ValueError):  # not every callable tells its parameters
        return False


def _guarded(manager: PluginManager, plugin: str, function: Any) -> Processor:
    """A logits processor that is skipped after it fails; the failure counts as its plugin's."""
    alive = True

    def process(input_ids: Tensor, given: Tensor) -> Tensor:
        nonlocal alive
        if not alive:
            return given
        changed = manager.attempt(
            plugin,
            "apt_logits_processors",
            lambda: logits(function(input_ids, given.clone()), given),
        )
        alive = changed is not None
        return given if changed is None else changed

    return process
