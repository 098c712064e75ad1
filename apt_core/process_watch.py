"""Watches changes of the process that plugins leave behind, also before torch is imported."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any, Protocol

from apt_core.python_state import PYTHON_STATES, put_back

if TYPE_CHECKING:
    from apt_core.torch_state import TorchWatch


class Watch(Protocol):
    """Finds what a call has changed in the process, and puts it back."""

    stepping: bool
    """Whether steps are being taken in a known state."""
    checks_each_call: bool
    """Whether each call in a step is checked, not all calls of a hook at once."""

    def before(self) -> Any:
        """The present state, for :meth:`put_back`."""

    def unchanged(self) -> bool:
        """Whether the state equals that of every step, as far as a few cheap checks tell."""

    def put_back(self, before: Any = None, *, sets_modes: bool = False) -> list[str]:
        """Undo differences from ``before``, or from the state of every step, and return them as
        texts."""

    def accept_modes(self) -> None:
        """Record the present modes of the modules as intended."""


class EarlyWatch:
    """The watch while a profile is checked, before torch is imported.

    The state of torch is watched from the moment that something imports it.
    """

    stepping, checks_each_call = False, True

    def __init__(self) -> None:
        self._of_torch: TorchWatch | None = None

    def before(self) -> Any:
        return self.of_torch().before() if "torch" in sys.modules else _BeforeTorch(self)

    def unchanged(self) -> bool:
        return False

    def put_back(self, before: Any = None, *, sets_modes: bool = False) -> list[str]:
        if not isinstance(before, _BeforeTorch):
            return self.of_torch().put_back(before, sets_modes=sets_modes)
        before.close()
        found = put_back(PYTHON_STATES, before.values)
        if before.of_torch is not None:
            found += self.of_torch().put_back(before.of_torch, sets_modes=sets_modes)
        return found

    def accept_modes(self) -> None:
        """Do nothing: no model exists yet."""

    def of_torch(self) -> TorchWatch:
        """The watch over the state of torch too."""
        if self._of_torch is None:
            from apt_core.torch_state import TorchWatch

            self._of_torch = TorchWatch()
        return self._of_torch


class _BeforeTorch(MetaPathFinder):
    """The state before torch is imported; ``of_torch`` is torch's state right after an import."""

    def __init__(self, watch: EarlyWatch) -> None:
        self.values = [state.get() for state in PYTHON_STATES]
        self.of_torch: Any = None
        self._watch = watch
        sys.meta_path.insert(0, self)

    def close(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        self.close()
        spec = importlib.util.find_spec(name)
        loader: Any = spec.loader if spec is not None else None
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                loader.exec_module = execute
                execute(module)
                self.of_torch = self._watch.of_torch().before()

            loader.exec_module = exec_module
        return spec


class SharedState:
    """The present state of the process that all threads share and the loop does not set, if torch
    is imported."""

    def __init__(self) -> None:
        self._values: list[Any] | None = None
        if "torch" in sys.modules:
            from apt_core.torch_state import shared_values

            self._values = shared_values()

    def put_back(self, names: Sequence[str]) -> list[str]:
        """Set the states of these ``names`` to what they were; what differed, as texts."""
        if self._values is None:
            return []
        from apt_core.torch_state import put_shared_back

        return put_shared_back(self._values, names)


@contextmanager
def watching_thread(changed: list[str]) -> Iterator[None]:
    """Add to ``changed`` the names of the states that all threads share and that differ at the end
    of the context, which a thread beside the loop is in, from those at its begin."""
    if "torch" not in sys.modules:
        yield
        return
    from apt_core.torch_state import watching_thread as watching

    with watching(changed):
        yield
