"""Computes the stages of a run: the enabled plugins and the model's structure in each, and which
of its parameters are trained."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Size, nn

from apt_core.config import Config, InactiveKey
from apt_core.errors import ConfigError, Problem
from apt_core.kernel import Kernel
from apt_core.modeling.blocks import block_stack
from apt_core.modeling.carry import carry_frozen
from apt_core.modeling.costs import (
    BACKWARD_AND_FORWARD,
    ModelCost,
    layer_flops,
    layers_of,
)
from apt_core.modeling.structure import (
    base_structure,
    config_after,
    transform_of,
    transforming_plugins,
)
from apt_core.modeling.trainable import Change, PlacedStage, declared_stages, faults_of, listed
from apt_core.modeling.transforms import ModelTransform
from apt_core.schedules import Boundary, Horizon, Placed, Schedule
from apt_core.types import FIRST, PluginCosts


@dataclass(frozen=True)
class Structure:
    """A model on the meta device; ``config`` has its sizes. ``shares`` maps the name of a parameter
    to the share of it that one token uses, if that is not all of it. ``added`` are the FLOPs that
    plugins add to a token's forward in each layer, compared with what the providers tell of these
    sizes; ``added_outside`` those outside of the layers."""

    model: nn.Module
    config: Config
    added: Sequence[float]
    added_outside: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def first(cls, kernel: Kernel) -> Structure:
        """The model at the start of the run, before any plugin changes it."""
        model = base_structure(kernel)
        return cls(model, kernel.config, [0.0] * len(layers_of(model)))

    def after(self, transform: ModelTransform) -> Structure:
        """The structure after ``transform``, in which what was frozen stays so. Its added FLOPs are
        divided equally among the layers whose parameters it changes."""
        carry_frozen(transform, self.model, transform.model)
        config, model = config_after(self.config, transform), transform.model
        shares = {**self._shares_after(transform), **transform.active_share}
        old, new = ([_shapes(la) for la in layers_of(m)] for m in (self.model, model))
        sources = self._sources_of_layers(transform, len(new))
        if sources is None:
            # If the number of layers changes, the FLOPs of each layer are not known.
            outside = self.added_outside + sum(self.added) + transform.added_flops
            return Structure(model, config, [0.0] * len(new), outside, shares)
        changed = [old[source] != after for source, after in zip(sources, new, strict=True)]
        each = transform.added_flops / sum(changed) if any(changed) else 0.0
        added = [self.added[source] for source in sources]
        if config is not self.config and any(added):
            # What plugins have added to a layer grows as the layer does.
            sizes = [[sum(s.numel() for _, s in la) for la in layers] for layers in (old, new)]
            added = [
                a * size / sizes[0][source]
                for a, size, source in zip(added, sizes[1], sources, strict=True)
            ]
        return Structure(
            model,
            config,
            [a + each * has for a, has in zip(added, changed, strict=True)],
            self.added_outside + (0 if any(changed) else transform.added_flops),
            shares,
        )

    def _shares_after(self, transform: ModelTransform) -> dict[str, float]:
        """The shares by the names that their parameters have after ``transform``."""
        known, shares = dict(self.model.named_parameters()), {}
        for name, _ in transform.model.named_parameters():
            origin = transform.origin(name, known)
            source = name if origin is None else origin.source
            if source in self.shares:
                shares[name] = self.shares[source]
        return shares

    def _sources_of_layers(self, transform: ModelTransform, number: int) -> list[int] | None:
        """Which layer each of the ``number`` after ``transform`` was, or is like; None if that is
        not said."""
        before = {
            f"{block_stack(self.model)[0]}.{index}": index for index in range(len(self.added))
        }
        stack = block_stack(transform.model)[0]
        names = [transform.old_name(f"{stack}.{index}") for index in range(number)]
        if len(names) != len(before) and not transform.moved:
            return None
        return [before[name] for name in names] if set(names) <= set(before) else None

    @property
    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def active_params(self) -> int:
        """The number of parameters that one token uses."""
        parameters = self.model.named_parameters()
        return round(sum(p.numel() * self.shares.get(name, 1.0) for name, p in parameters))

    @property
    def trained_params(self) -> int:
        """The number of parameters that are not frozen."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def changed(self, change: Change) -> Structure:
        """The structure after a stage of the trainable set."""
        model = copy.deepcopy(self.model)
        change.apply(model)
        return replace(self, model=model)

    def flops_per_token(self, cost: ModelCost) -> int | None:
        """FLOPs of training per token; ``cost`` is that of a model of the sizes of ``config``."""
        added = BACKWARD_AND_FORWARD * (sum(self.added) + self.added_outside)
        return None if cost.flops_per_token is None else cost.flops_per_token + round(added)

    def layer_flops(self, kernel: Kernel, seq_len: int) -> list[float] | None:
        """FLOPs of training per token of a sequence of ``seq_len``, by layer; None if unknown."""
        base = layer_flops(kernel, self.config.model, seq_len)
        if base is None or len(base) != len(self.added):
            return None
        return [b + BACKWARD_AND_FORWARD * a for b, a in zip(base, self.added, strict=True)]


@dataclass(frozen=True)
class Stage:
    """A stage that begins at position ``at``, counted in ``unit``. ``costs`` are those of the
    enabled plugins; ``switches`` says that the structure of the model changes at its start."""

    name: str
    unit: str
    at: int
    structure: Structure
    costs: PluginCosts
    switches: bool = False


@dataclass(frozen=True)
class _Moment:
    """A stage, without the costs of the plugins ``enabled`` in it."""

    name: str
    unit: str
    at: int
    structure: Structure
    enabled: Sequence[str]
    switches: bool = False


def stages(kernel: Kernel, schedule: Schedule) -> Iterator[Stage]:
    """Yield a stage for the start and for each position at which ``schedule``, the kernel's with
    its horizon, enables or disables a plugin, or other parameters are trained.

    Plugins that change the model are asked for their transforms, in the order of the run. Their
    ConfigError and PluginError are raised, and after the last stage a ConfigError for what is wrong
    with the stages of the trainable set.
    """
    for moment in _moments(kernel, schedule, declared_stages(kernel, schedule)):
        costs = plugin_costs(kernel, moment.enabled)
        yield Stage(moment.name, moment.unit, moment.at, moment.structure, costs, moment.switches)


def checked_trainable(kernel: Kernel, schedule: Schedule) -> list[PlacedStage]:
    """The stages of the trainable set, checked against the structures of the run; adds inactive
    keys for those that come after its end. Raises as :func:`stages` does."""
    placed = declared_stages(kernel, schedule)
    if not placed:
        return placed
    for _ in _moments(kernel, schedule, placed):
        pass
    last = schedule.horizon.last("step")
    kernel.add_inactive(
        InactiveKey(
            each.stage.key or f"plugin {each.plugin}",
            f"the run ends with step {last}, before {each.unit} {each.at}",
        )
        for each in placed
        if not _reached(each, schedule.horizon)
    )
    return placed


def _moments(
    kernel: Kernel, schedule: Schedule, placed: Sequence[PlacedStage]
) -> Iterator[_Moment]:
    found: list[Boundary | PlacedStage] = [*schedule.boundaries()]
    found += placed
    events = [
        event
        for event in schedule.in_order(found)
        if kernel.manager.has_plugin(event.plugin) and _reached(event, schedule.horizon)
    ]
    waiting = {e.plugin for e in events if isinstance(e, Boundary) and e.enables}
    records = kernel.manager.records.values()
    enabled = {r.name: None for r in records if r.state == "active" and r.name not in waiting}
    structure = Structure.first(kernel)
    transforming = transforming_plugins(kernel, schedule)
    for plugin in transforming:
        if plugin not in waiting:
            structure = _after(kernel, structure, plugin) or structure
    trainable = _Trainable()
    for event in [*events]:
        if isinstance(event, PlacedStage) and event.at == FIRST[event.unit]:
            events.remove(event)
            structure = trainable.after(event, structure, event.plugin in enabled)
    yield _Moment("start", "epoch", FIRST["epoch"], structure, [*enabled])
    for event in events:
        plugin, before, name = event.plugin, structure, ""
        if isinstance(event, PlacedStage):
            structure = trainable.after(event, structure, plugin in enabled)
            name = trainable.told
        elif event.enables:
            enabled[plugin] = None
            name = f"enable {plugin}"
            if plugin in transforming:
                structure = _after(kernel, structure, plugin) or structure
        else:
            enabled.pop(plugin, None)
            name = f"disable {plugin}"
        switches = structure is not before and not isinstance(event, PlacedStage)
        if isinstance(event, Boundary) and event.enables:
            structure = trainable.enabled(plugin, structure)
        if name:
            yield _Moment(name, event.unit, event.at, structure, [*enabled], switches)
    if trainable.problems:
        raise ConfigError(trainable.problems)


class _Trainable:
    """Follows the stages of the trainable set; ``problems`` are what is wrong with them, and
    ``told`` says what the newest one changed."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.told = ""
        self._waiting: dict[str, list[PlacedStage]] = {}
        self._last: dict[str, PlacedStage] = {}

    def after(self, placed: PlacedStage, structure: Structure, enabled: bool) -> Structure:
        """The structure after a stage that is reached; one of a plugin that is not ``enabled``
        waits for it."""
        self.told = ""
        plugin, before = placed.plugin, self._last.get(placed.plugin, placed)
        self._last[plugin] = placed
        if placed.number < before.number:
            self.problems.append(
                Problem(
                    f"{before.unit} {before.at} does not come after {placed.unit} {placed.at}, "
                    "where a stage above it begins",
                    before.stage.key or f"plugin {plugin}",
                    hint="put stages in the order of the run",
                )
            )
        if not enabled:
            self._waiting.setdefault(plugin, []).append(placed)
            return structure
        # What is wrong with one stage makes others look wrong.
        self.problems += faults_of(placed, structure.model, known=not self.problems)
        change = Change.of(placed.stage, structure.model)
        self.told = "; ".join(
            f"{'thaw' if what == 'thawed' else 'freeze'} {listed(patterns)}"
            for what, (patterns, _) in change.parts(structure.model).items()
        )
        return structure.changed(change)

    def enabled(self, plugin: str, structure: Structure) -> Structure:
        """The structure once ``plugin`` is enabled: its stages that were reached before begin."""
        for placed in self._waiting.pop(plugin, []):
            self._last.pop(plugin)
            structure = self.after(placed, structure, True)
        return structure


def _reached(placed: Placed, horizon: Horizon) -> bool:
    """Whether the run comes to where something is ``placed``, as far as ``horizon`` knows."""
    unit = placed.unit
    here, last = horizon.first_step_from(placed.at, unit), horizon.last("step")
    if here is None:  # without the data units cannot be converted
        here, last = placed.at, horizon.last(unit)
    return last is None or here <= last


def _after(kernel: Kernel, structure: Structure, plugin: str) -> Structure | None:
    transform = transform_of(kernel, plugin, copy.deepcopy(structure.model), structure.config)
    return None if transform is None else structure.after(transform)


def plugin_costs(kernel: Kernel, plugins: Iterable[str]) -> PluginCosts:
    """The sum of the costs that ``plugins`` report."""
    asked = (kernel.manager.call_plugin(p, "apt_costs", config=kernel.config) for p in plugins)
    return sum(filter(None, asked), PluginCosts())


def _shapes(layer: nn.Module) -> list[tuple[str, Size]]:
    return [(name, parameter.shape) for name, parameter in layer.named_parameters()]
