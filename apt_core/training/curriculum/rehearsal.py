"""Tries the transforms of a whole run before its first step, so that they do not fail later."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.config import Config
from apt_core.error_text import one_line
from apt_core.errors import ConfigError
from apt_core.kernel import Kernel
from apt_core.log import get_logger
from apt_core.modeling.carry import materialize
from apt_core.modeling.compose import ModelBuilder
from apt_core.modeling.init import construction_rng, generator_for
from apt_core.modeling.structure import (
    HOOK,
    base_structure,
    config_after,
    structure_after,
    transform_of,
    transforming_plugins,
)
from apt_core.modeling.transforms import ModelTransform
from apt_core.schedules import Schedule

log = get_logger("apt.training")

MOST = 2**23
"""The most parameters of a model whose loss is compared, so that it takes a moment on a CPU."""

GROWTH = 8
"""The largest factor by which a transform may grow the model that is tried."""

ROWS, LENGTH = 2, 32

NOISE = 0.1
"""The size of the noise added to each parameter: one that starts at zero would hide errors behind
it."""


def rehearse(kernel: Kernel, schedule: Schedule) -> None:
    """Apply the transforms of the whole run, and compare the loss before and after each.

    The trial uses the profile's model if it is small, otherwise a copy with two layers and few ids
    if that is small; for larger models the structure alone is checked. It runs on the CPU in fp32
    with untrained weights: errors that depend on trained weights, the optimizer's state or other
    plugins appear at the switch only. An error of a rule is logged here, and fails the switch.
    Raises as :func:`transform_of` does.
    """
    plugins = transforming_plugins(kernel, schedule)
    if not plugins:
        return
    trial = _Trial.of(kernel)
    if trial is None:
        structure_after(kernel, plugins)
        return
    structure, config = base_structure(kernel), kernel.config
    for plugin in plugins:
        transform = transform_of(kernel, plugin, copy.deepcopy(structure), config)
        if transform is not None:
            structure, config = copy.deepcopy(transform.model), config_after(config, transform)
            trial.compare(plugin, transform)


class _Trial:
    """A model with weights that is transformed as the run's model will be."""

    def __init__(self, kernel: Kernel, config: Config) -> None:
        self._kernel, self._config = kernel, config
        self._whole = config is kernel.config
        self._structure = base_structure(kernel, config)
        with construction_rng(0, "rehearsal"), torch.no_grad():
            self._model: nn.Module | None = ModelBuilder(config, kernel.registry).build_model()
            for name, parameter in self._model.named_parameters():
                size = parameter.square().mean().sqrt().clamp(min=0.02)
                noise = torch.randn(parameter.shape, generator=generator_for(0, f"noise/{name}"))
                parameter.add_(NOISE * size * noise)
        self._ids = torch.randint(
            config.model.vocab_size,
            (ROWS, min(LENGTH, config.model.max_seq_len)),
            generator=generator_for(0, "rehearsal/ids"),
        )

    @classmethod
    def of(cls, kernel: Kernel) -> _Trial | None:
        """A trial with the profile's shapes or with reduced ones; None if both are too large or
        cannot be computed."""
        for config in (kernel.config, _cut(kernel.config)):
            try:
                if _parameters(base_structure(kernel, config)) <= MOST:
                    return cls(kernel, config)
            except Exception as error:
                if kernel.manager.failures.lets_through(error):
                    raise
                log.debug("no loss is compared in a rehearsal: %s", one_line(error))
                return None
        return None

    def compare(self, plugin: str, transform: ModelTransform) -> None:
        """Count a failure of ``plugin`` if ``transform``, made from the profile's structure,
        changes the loss. If the new model cannot be made, nothing is concluded and later transforms
        are not compared."""
        manager = self._kernel.manager
        if self._model is None:
            return
        old, self._model = self._model, None
        try:
            with construction_rng(0, "rehearsal"):
                own = transform if self._whole else self._transform_of_copy(plugin)
                if own is None or _parameters(own.model) > GROWTH * MOST:
                    return
                own = replace(own, model=copy.deepcopy(own.model))
                self._config = config_after(self._config, own)
                before = _loss(old, self._ids, own.compared_ids)
                seed, layers = self._config.training.seed, self._config.model.num_layers
                new = materialize(own, old, seed=seed, num_layers=layers)
                after = _loss(new, self._ids, own.compared_ids)
        except (Exception, SystemExit) as error:
            if manager.failures.lets_through(error):
                raise
            if self._whole and self._fatal(plugin):
                # A ConfigError of the hook is bad input; one of a rule is a failure.
                told = RuntimeError(str(error)) if isinstance(error, ConfigError) else error
                manager.failures.fail(plugin, HOOK, told)
            log.warning(
                "what %s will make of the model could not be tried before the start: %s",
                plugin,
                one_line(error),
            )
            return
        # Negated, so that NaN counts as beyond the tolerance.
        if not abs(after - before) <= own.tolerance:
            of = "the model" if self._whole else "a copy of the model with fewer layers and ids"
            changed = ValueError(
                f"tried before the start, it changes the loss of {of}, not trained, from "
                f"{before:.7g} to {after:.7g}, by more than its tolerance of {own.tolerance:g}"
            )
            manager.failures.fail(plugin, HOOK, changed)
            self._model = old
        else:
            self._model = new

    def _fatal(self, plugin: str) -> bool:
        manager = self._kernel.manager
        return manager.strict or manager.records[plugin].on_failure == "required"

    def _transform_of_copy(self, plugin: str) -> ModelTransform | None:
        """The plugin's transform of the reduced copy. A failure of the hook does not count: the
        plugin need not support other shapes than the profile's."""
        manager = self._kernel.manager
        before = {name: p.shape for name, p in self._structure.named_parameters()}
        given = {
            "model": copy.deepcopy(self._structure),
            "config": self._config,
            "registry": self._kernel.registry,
            "trains": True,
        }
        (call,) = (c for c in manager.order(HOOK, dormant=True) if c.plugin == plugin)
        with torch.device("meta"):
            transform = call.function(*(given[name] for name in call.argnames))
        if not isinstance(transform, ModelTransform):
            return None
        transform.check(before)
        self._structure = copy.deepcopy(transform.model)
        return transform


def _cut(config: Config) -> Config:
    """The profile reduced to two layers and few ids and positions."""
    model = config.model
    cut = {
        "num_layers": min(2, model.num_layers),
        "vocab_size": min(512, model.vocab_size),
        "max_seq_len": min(2 * LENGTH, model.max_seq_len),
    }
    return config.model_copy(update={"model": model.model_copy(update=cut)})


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def _loss(model: nn.Module, ids: Tensor, first: int | None) -> float:
    """The mean cross-entropy of the next ids, in nats, in eval mode; over the ``first`` ids alone,
    if given."""
    logits = model.eval()(ids[:, :-1]).logits.flatten(0, 1)[:, :first].float()
    losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    return float(losses.double().mean())
