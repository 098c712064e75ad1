"""Guards the torch hooks that plugins register on the model and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from apt_core.plugin_manager import PluginManager

MODULE_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks",
    "_state_dict_pre_hooks", "_state_dict_hooks",
)  # fmt: skip
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
GLOBAL_HOOKS = (
    "_global_forward_pre_hooks", "_global_forward_hooks",
    "_global_backward_pre_hooks", "_global_backward_hooks",
)  # fmt: skip
"""Attributes in which torch keeps hooks: mappings, or None."""


class Callbacks:
    """Wraps the hooks that plugins register with torch.

    A failure of a hook counts as a failure of its plugin, and the forward goes on without the hook.
    A hook that has returned a value is part of the model: its failure is raised. Hooks of a
    compiled model are called ``apart``, between its graphs: inside one, every number that a hook
    keeps would cause a recompilation.
    """

    def __init__(self, manager: PluginManager, *, apart: bool = False) -> None:
        self._manager, self._apart = manager, apart
        self._seen = -1

    def guard(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Wrap the hooks registered since the last call. If this process registered none, the call
        is one comparison."""
        if self._seen == RemovableHandle.next_id:
            return
        self._seen = RemovableHandle.next_id
        for hooks in _registered(model, optimizer):
            for key, function in list(hooks.items()):
                plugin = self._manager.failures.author_of(function)
                if plugin is not None and not isinstance(function, _Guarded):
                    hooks[key] = _Guarded(self._manager, plugin, function, apart=self._apart)

    def close(self) -> None:
        """Remove the hooks of all modules that plugins of this run have left in torch: the models
        of later runs would call them."""
        for name in GLOBAL_HOOKS:
            hooks = getattr(torch_module, name)
            for key, function in list(hooks.items()):
                if isinstance(function, _Guarded) and function.manager is self._manager:
                    del hooks[key]


def _registered(model: nn.Module, optimizer: Optimizer) -> Iterator[MutableMapping[Any, Any]]:
    places: list[tuple[Any, tuple[str, ...]]] = [
        (torch_module, GLOBAL_HOOKS),
        (optimizer, OPTIMIZER_HOOKS),
        *((module, MODULE_HOOKS) for module in model.modules()),
        *((parameter, PARAMETER_HOOKS) for parameter in model.parameters()),
    ]
    for owner, names in places:
        for name in names:
            hooks = getattr(owner, name, None)
            if hooks:
                yield hooks


class _Guarded:
    """A torch hook of a plugin; does nothing once the plugin is quarantined."""

    def __init__(
        self,
        manager: PluginManager,
        plugin: str,
        function: Callable[..., Any],
        *,
        apart: bool,
    ) -> None:
        self.manager, self._plugin, self._function = manager, plugin, function
        self._call = torch.compiler.disable(self._guarded) if apart else self._guarded
        self._name = manager.failures.callback_name(function)
        self._takes_part = False

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._call(*args, **options)

    def _guarded(self, *args: Any, **options: Any) -> Any:
        if self.manager.is_quarantined(self._plugin):
            return None
        try:
            if torch.compiler.is_compiling():
                result = self._function(*args, **options)
            else:
                judged = not self._takes_part
                with self.manager.watching(self._plugin, self._name, self._function, judged=judged):
                    result = self._function(*args, **options)
        except BaseException as error:
            if self._takes_part:
                raise
            self.manager.failures.callback_failed(self._plugin, self._function, error)
            return None
        self._takes_part = self._takes_part or result is not None
        return result
