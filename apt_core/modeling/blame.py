"""Attributes an error in a forward or backward pass to the plugin whose code raised it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from apt_core.code_source import short_path
from apt_core.error_text import frames_of, one_line, text_of
from apt_core.errors import (
    AptError,
    ConfigError,
    PluginError,
    ProviderError,
    TrainingError,
)
from apt_core.kernel import Kernel
from apt_core.parallel.world import explained
from apt_core.plain_values import MAX_FACTOR, within
from apt_core.types import CORE, ProviderSpec


def attributed(kernel: Kernel, error: BaseException, terms: Collection[str] = ()) -> BaseException:
    """The error to raise for ``error``: a ProviderError that names provider and line if it passed
    through a plugin's provider; a PluginError, counted as a failure, if it passed through other
    code of a plugin, such as a torch hook; otherwise ``error`` itself. A ValueError before the
    first step is bad input. If no plugin's code is found, the message names the step's loss
    ``terms``.

    Such a failure ends the run: with another layer it would train another model.
    """
    error = explained(error)
    manager = kernel.manager
    own = isinstance(error, AptError) and not isinstance(error, PluginError)
    if own or manager.failures.lets_through(error):
        return error
    found = _culprit(kernel, error)
    author = None if found else manager.failures.culprit(error)
    if isinstance(error, ValueError) and kernel.manager.step == 0:
        key = f"provider {found[0].key} of plugin {found[0].plugin}" if found else ""
        key = f"plugin {author[0]}" if author else key
        return ConfigError(text_of(error), key=key, where=found[1] if found else "")
    if author is not None:
        plugin, function = author
        failure = manager.records[plugin].add_failure(
            error,
            hook=f"{function} (a callback)",
            limit=1,
            step=manager.step,
            code=manager.get_plugin(plugin),
        )
        return PluginError(
            f"plugin {plugin} failed in {failure.hook} at step {failure.step} ({failure.where}): "
            f"{failure.error}; the run stops because what called it cannot go on",
            plugin=plugin,
            hook=failure.hook,
            where=failure.where,
        )
    if found is None and terms:
        return TrainingError(
            f"step {kernel.manager.step} failed: {one_line(error)}; plugins had a part in its "
            f"loss: {', '.join(terms)} (leave one out with --plugin no:NAME)"
        )
    if found is None:
        return error
    spec, where = found
    return ProviderError(
        f"provider {spec.key} of plugin {spec.plugin} failed at step {kernel.manager.step} "
        f"({where}): {one_line(error)}"
    )


@contextmanager
def naming_authors(kernel: Kernel) -> Iterator[None]:
    """Replace errors raised in the context by those of :func:`attributed`."""
    try:
        yield
    except BaseException as error:
        known = attributed(kernel, error)
        if known is error:
            raise
        raise known from error


def usable_factor(kernel: Kernel, factor: Any) -> float:
    """The learning-rate schedule's factor for a step as a float.

    Raises ProviderError, which names the schedule, for a value that would destroy the weights: no
    number, NaN, a negative or a huge one.
    """
    try:
        return within(factor, "the factor of the learning rate", MAX_FACTOR)
    except (TypeError, ValueError, OverflowError) as error:
        registry, name = kernel.registry, kernel.config.training.lr_schedule_name
        used = registry.spec("lr_schedule", registry.resolutions["lr_schedule", name].used)
        raise ProviderError(
            f"provider {used.key} of plugin {used.plugin} failed at step {kernel.manager.step}: "
            f"{error}"
        ) from None


def _culprit(kernel: Kernel, error: BaseException) -> tuple[ProviderSpec, str] | None:
    used = [kernel.registry.spec(r.kind, r.used) for r in kernel.registry.resolutions.values()]
    foreign = {_module(spec): spec for spec in used if spec.plugin != CORE}
    frames = list(frames_of(error)) if foreign else []
    for frame, line in reversed(frames):
        name = frame.f_globals.get("__name__", "")
        for module, spec in foreign.items():
            if name == module or name.startswith(module.rpartition(".")[0] + "."):
                return spec, f"{short_path(frame.f_code.co_filename)}:{line}"
    return None


def _module(spec: ProviderSpec) -> str:
    if isinstance(spec.factory, str):
        return spec.factory.partition(":")[0]
    return str(getattr(spec.factory, "__module__", ""))
