"""A plugin that records hook calls with their arguments, in order."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

from apt_core import hookspecs
from apt_core.errors import did_you_mean
from apt_core.hookspecs import POLICIES
from apt_core.markers import Priority, hookimpl


class Recorder:
    """Records calls of hooks as ``(hook, arguments)`` in ``calls``; returns None from each.

    By default it implements every ``on_*`` hook. Raises ValueError for an unknown hook.

    >>> from apt_core.plugin_manager import PluginManager
    >>> manager, recorder = PluginManager(), Recorder()
    >>> _ = manager.register(recorder, "recorder")
    >>> _ = manager.hook.on_epoch_start(epoch=1, trainer=None)
    >>> recorder.names
    ['on_epoch_start']
    """

    def __init__(
        self, hooks: Collection[str] | None = None, *, priority: int = Priority.NORMAL
    ) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for name in (n for n in POLICIES if n.startswith("on_")) if hooks is None else hooks:
            if name not in POLICIES:
                hint = did_you_mean(name, POLICIES)
                raise ValueError(f"there is no hook {name!r} {hint}".rstrip())
            listener = self._listener(name, getattr(hookspecs, name))
            setattr(self, name, hookimpl(priority=priority)(listener))

    def _listener(self, name: str, spec: Callable[..., Any]) -> Callable[..., None]:
        signature = inspect.signature(spec)

        def listen(*arguments: Any) -> None:
            self.calls.append((name, dict(zip(signature.parameters, arguments, strict=True))))

        listen.__name__ = name
        listen.__signature__ = signature  # type: ignore[attr-defined]
        return listen

    @property
    def names(self) -> list[str]:
        """The hooks that were called, in order."""
        return [name for name, _ in self.calls]

    def count(self, hook: str) -> int:
        return self.names.count(hook)

    def assert_order(self, *hooks: str) -> None:
        """Assert that the hooks were called in this order, with any others in between.

        The AssertionError shows how far the order was followed.
        """
        remaining = iter(self.names)
        for position, hook in enumerate(hooks):
            if hook not in remaining:
                after = f" after {hooks[position - 1]}" if position else ""
                raise AssertionError(f"{hook} was not called{after}; calls: {self.names}")
