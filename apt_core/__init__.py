"""APT: a micro-kernel for training transformer language models, extended by pluggy plugins.

What plugin authors import is here; nothing in this module imports torch.
"""

from apt_core.errors import AptError, ConfigError, Problem, StopTraining
from apt_core.markers import Priority, hookimpl
from apt_core.types import (
    FallbackEvent,
    GenerationRequest,
    GenerationResult,
    Inactive,
    Message,
    ModelOutput,
    PluginCosts,
    PluginFailure,
    PluginInfo,
    ProviderSpec,
    RewrittenPrompt,
    RunFacts,
    SectionSpec,
    Source,
    TokenLogprob,
    TrainableStage,
)

__version__ = "0.1.0"

__all__ = [
    "AptError",
    "ConfigError",
    "FallbackEvent",
    "GenerationRequest",
    "GenerationResult",
    "Inactive",
    "Message",
    "ModelOutput",
    "PluginCosts",
    "PluginFailure",
    "PluginInfo",
    "Priority",
    "Problem",
    "ProviderSpec",
    "RewrittenPrompt",
    "RunFacts",
    "SectionSpec",
    "Source",
    "StopTraining",
    "TokenLogprob",
    "TrainableStage",
    "__version__",
    "hookimpl",
]
