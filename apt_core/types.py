"""The small typed objects that pass between the kernel and plugins. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torch import Tensor

    from apt_core.errors import Problem

CORE = "core"
"""What listings and manifests show as the plugin of the core's own providers."""


@dataclass(frozen=True)
class PluginInfo:
    """Facts about a plugin: assign one to ``PLUGIN`` in its module, or in its class.

    ``requires`` are PEP 508 requirements (``"faiss-cpu>=1.8"``), ``conflicts`` names of plugins
    that cannot be active in the same run. An ``observer`` reports and changes no weight, so that
    its settings may differ when a run is resumed; one whose hooks get neither the trainer nor the
    model need not say so. It cannot implement a hook whose result is part of the training.
    """

    summary: str = ""
    version: str = ""
    requires: Sequence[str] = ()
    conflicts: Sequence[str] = ()
    observer: bool = False


@dataclass(frozen=True)
class ProviderSpec:
    """One implementation of one kind, as a plugin declares it.

    ``factory(config)`` returns the provider; it is a callable or ``"module:attribute"``, resolved
    on first use. ``config`` is the pydantic model (or ``"module:attribute"``) of its settings, and
    ``section`` the part of the profile that holds them (``"model.tva"``). ``requires`` are PEP 508
    requirements, ``conflicts`` other providers as ``"kind:name"``. ``plugin`` is stamped by the
    manager. A dataset tells by ``files`` which of ``train_path`` and ``val_path`` it reads as
    files: these must be there before a run starts, and one that it does not read is reported
    inactive; None: they may mean anything to it, such as a query.

    ``reads`` are the keys outside of ``section`` that not every provider of the kind heeds, and
    this one does (``"training.betas"``): such a key is reported as inactive where the provider in
    use says what it reads and does not name it. None says nothing.
    """

    kind: str
    name: str
    factory: Callable[..., Any] | str
    version: str = ""
    summary: str = ""
    requires: Sequence[str] = ()
    conflicts: Sequence[str] = ()
    config: type[BaseModel] | str | None = None
    section: str = ""
    default: bool = False
    plugin: str = ""
    files: Sequence[str] | None = None
    reads: Sequence[str] | None = None

    @property
    def key(self) -> str:
        return f"{self.kind}:{self.name}"


class ProviderSource(Protocol):
    """What code that builds layers needs of the registry."""

    def get(self, kind: str, name: str, config: Any = None, fallback: bool = True) -> Any:
        """The provider of ``kind`` that is called ``name``, built with ``config``, by default with
        the settings of the profile."""

    def spec(self, kind: str, name: str) -> ProviderSpec:
        """What is declared of it. Raises ConfigError for one that nobody registers."""


@dataclass(frozen=True)
class Inactive:
    """A setting that other settings make inactive: its dotted ``key`` (or that of a whole section),
    the ``reason``, and the keys ``because`` of whose values it is inactive."""

    key: str
    reason: str
    because: Sequence[str] = ()


@dataclass(frozen=True)
class SectionSpec:
    """A section of the profile that a plugin owns.

    ``path`` is dotted (``"model.moe"``, ``"my_plugin"``), ``model`` the pydantic model that
    validates it; ``schedule_params`` are the names of the parameters under ``schedules:`` that the
    plugin reads. A plugin that only reads schedule parameters leaves ``path`` and ``model`` out.

    ``names`` are the keys of the section that name a provider, each with its kind:
    ``{"router": "router"}`` of ``model.moe`` lets ``model.moe.router`` choose a router.

    ``check(config)`` gives a :class:`~apt_core.Problem` for each fault of a profile whose keys are
    valid one by one: contradictions within the section, and with the rest. A problem without a
    place gets that of its key. ``inactive(config)`` yields the settings that are inactive in such
    a profile; those that somebody has written are reported.

    Where the plugin is installed and not active, what is written in the section is checked by the
    model and reported as inactive, unless it says ``enabled: false``; ``without`` is what the run
    does in place of it, for that report. ``plugin`` is stamped when the plugin is asked.
    """

    path: str = ""
    model: type[BaseModel] | None = None
    schedule_params: Sequence[str] = ()
    inactive: Callable[[Any], Iterable[Inactive]] | None = None
    check: Callable[[Any], Iterable[Problem]] | None = None
    names: Mapping[str, str] = field(default_factory=dict, hash=False)
    without: str = ""
    plugin: str = ""


@dataclass(frozen=True)
class PluginFailure:
    """One failure of a plugin: what ``on_plugin_failure`` is told and the manifest keeps.

    ``where`` is ``file:line`` of the plugin's own deepest frame, ``count`` how often the plugin
    has failed so far, ``traceback`` the formatted text (never the exception: it would keep
    tensors alive).
    """

    plugin: str
    hook: str
    step: int
    error: str
    where: str
    count: int
    quarantined: bool
    traceback: str = field(repr=False, default="")


@dataclass(frozen=True)
class FallbackEvent:
    """A provider was asked for and another is used: what ``on_provider_fallback`` is told."""

    kind: str
    asked: str
    used: str
    reason: str


@dataclass(frozen=True)
class PluginCosts:
    """What a plugin takes while it is enabled, beside the training of the model: how many
    ``averages`` of the weights it keeps, and how often it computes the model for each micro-batch,
    in ``forwards`` without gradients and in ``passes`` with their backward."""

    averages: int = 0
    forwards: int = 0
    passes: int = 0

    def __add__(self, other: PluginCosts) -> PluginCosts:
        return PluginCosts(
            self.averages + other.averages,
            self.forwards + other.forwards,
            self.passes + other.passes,
        )


@dataclass
class ModelOutput:
    """What a backbone returns: ``logits`` [B, T, V] and the last ``hidden`` states [B, T, D]."""

    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class GenerationRequest:
    """One generation: what the ``*_generation_*`` hooks are given."""

    prompt: str
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 40
    seed: int = 0


@dataclass(frozen=True)
class GenerationResult:
    """``text`` is the continuation without the prompt; ``tokens`` its ids."""

    text: str
    tokens: Sequence[int]
