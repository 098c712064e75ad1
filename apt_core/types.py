"""The small typed objects that pass between the kernel and plugins. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import BaseModel
    from torch import Tensor

    from apt_core.errors import Problem

CORE = "core"
"""What listings and manifests show as the plugin of the core's own providers."""


Unit = Literal["epoch", "step", "token"]
"""In what a position of a run is counted."""

FIRST: Mapping[Unit, int] = {"epoch": 1, "step": 1, "token": 0}
"""The first position of a run in each unit."""


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

    ``grows`` are the keys of the section that replace a size of the core's later in the run:
    ``{"vocab_size": "model.vocab_size"}``.

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
    grows: Mapping[str, str] = field(default_factory=dict, hash=False)
    without: str = ""
    plugin: str = ""


@dataclass(frozen=True)
class TrainableStage:
    """From the position ``at`` on, counted in ``unit`` as by the keys of ``schedules``, other
    parameters are trained: those that ``freeze`` chooses are frozen, then those that ``thaw``
    chooses are not frozen any more.

    Both are patterns (:func:`apt_core.modeling.parameter_names.matches`): ``embedding``,
    ``blocks.0-3``, ``blocks.*.attention``. ``key`` is that of the profile from which the stage is.
    """

    freeze: Sequence[str] = ()
    thaw: Sequence[str] = ()
    unit: Unit = "step"
    at: int = 1
    key: str = ""


@dataclass(frozen=True)
class RunFacts:
    """What a run is, for those that report on it: nothing in it changes, or leads to the model.

    ``folder`` is the run's, ``name`` that of the profile. ``settings`` is the resolved profile as
    plain data, with masks in the place of its secrets. ``rank`` is that of this process, from 0,
    among ``world_size``; ``device`` is where it computes. ``parameters`` are the number of the
    model's at the start of this part of the run, ``step`` the steps that were taken before it.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any] = field(repr=False)
    rank: int = 0
    world_size: int = 1
    device: str = ""
    parameters: int = 0
    step: int = 0

    def __copy__(self) -> RunFacts:
        """With settings of its own: each implementation of a hook is given a copy."""
        return replace(self, settings=deepcopy(self.settings))


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


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Source:
    """A passage that went into a prompt: the file ``path``, the passage's ``first_line`` there from
    1, its ``text``, and the ``score`` by which it was chosen."""

    path: str
    first_line: int = 1
    text: str = ""
    score: float = 0.0


@dataclass(frozen=True)
class RewrittenPrompt:
    """A prompt that ``apt_rewrite_prompt`` made, with the ``sources`` that the result is to
    cite."""

    prompt: str | Sequence[Message]
    sources: Sequence[Source] = ()


@dataclass(frozen=True)
class GenerationRequest:
    """One generation: what the ``*_generation_*`` hooks are given.

    ``prompt`` is a text to continue, or a conversation whose next turn is the assistant's. The next
    token is the most likely one at ``temperature`` 0; otherwise it is drawn from the softmax of the
    logits divided by ``temperature``, among the ``top_k`` most probable tokens (0: all), of these
    among the fewest that have ``top_p`` of the probability together, of these among those with at
    least ``min_p`` times the highest probability. ``repetition_penalty`` divides positive logits of
    tokens that the text holds already, and multiplies negative ones (Keskar et al. 2019).

    The text ends before the first of the strings ``stop``. ``seed`` decides every draw. With
    ``logprobs`` n, the result has the log-probability of each token and of the n most likely ones
    in its place; None leaves them out. ``sources`` are what the prompt was made of.
    """

    prompt: str | Sequence[Message]
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    seed: int = 0
    logprobs: int | None = None
    sources: Sequence[Source] = ()


@dataclass(frozen=True)
class TokenLogprob:
    """A token of a result with its log-probability in nats, by the softmax of the model's own
    logits; ``top`` are the ids and log-probabilities of the most likely tokens in its place.
    ``text`` is the token's own text."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class GenerationResult:
    """What a generation gave: ``text`` is the continuation without the prompt.

    ``token_ids`` are all tokens that were generated but the end of the text, those of a stop string
    included. ``finish_reason`` is ``stop`` (the end of the text, or a stop string), ``length``,
    ``interrupted``, or ``not_finite`` (the model's logits were not finite). ``prompt_tokens`` is
    the length of the prompt; the model did not see the first ``dropped_tokens`` of it, which its
    context could not hold. ``sources`` are those of the request. ``extra_tokens`` were computed
    beside the text, by a decoder that looks ahead.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str = "length"
    prompt_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    sources: tuple[Source, ...] = ()
    dropped_tokens: int = 0
    extra_tokens: int = 0
