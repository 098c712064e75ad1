"""The profile's sections, one pydantic model each: every key, its type, default and meaning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    Strict,
    model_serializer,
)

from apt_core.config.secret_fields import dump
from apt_core.config.yaml_text import yaml_of
from apt_core.kinds import KINDS
from apt_core.plugin_names import MAX_PLUGINS
from apt_core.providers.attention import MHASettings, TVASettings
from apt_core.providers.backbone import NgramSettings
from apt_core.providers.dataset import DataSection
from apt_core.providers.ffn import VFTSettings
from apt_core.providers.lr_schedule import DECAY_RATIO
from apt_core.providers.norm import NormSettings
from apt_core.providers.optimizer import ADAM_BETAS, ADAM_EPS, MuonSettings
from apt_core.providers.position import RoPESettings
from apt_core.secrets import without_secrets
from apt_core.sections import (
    Count,
    CountOrZero,
    Fraction,
    Name,
    ScheduleEntry,
    Section,
    Size,
    Text,
    one_of,
)

Names = Annotated[tuple[Name, ...], Strict(False), Field(max_length=10_000)]


DEFAULT_HOOK_TIMEOUT = 300.0


class PluginRequest(Section):
    """A plugin that the profile asks for: its name alone, or with options."""

    name: Name = Field(description="Installed name, dotted module, or path of a .py file.")
    priority: Annotated[int, Field(ge=0, le=100)] | None = Field(
        default=None, description="Replaces the priority of all its hooks; 0 to 100, lower first."
    )
    on_failure: Literal["isolate", "required"] | None = Field(
        default=None,
        description="isolate: go on without it; required: any failure ends the run. Without it, "
        "a plugin that is not found is an error, and failures when called are isolated.",
    )

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> Any:
        if self.priority is None and self.on_failure is None:
            return self.name
        return {key: value for key, value in handler(self).items() if value is not None}


def _name_alone(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


PluginEntry = Annotated[
    PluginRequest, BeforeValidator(_name_alone, json_schema_input_type=str | PluginRequest)
]


class ModelSection(Section):
    """``model``: sizes of the network and the providers of its parts."""

    d_model: Size = Field(default=128, description="Width of the residual stream.")
    num_heads: Size = Field(default=4, description="Attention heads; divides d_model.")
    num_layers: Annotated[int, Field(ge=1, le=2**12)] = Field(
        default=4, description="Number of blocks."
    )
    d_ff: Size = Field(default=512, description="Hidden width of the feed-forward.")
    vocab_size: Size = Field(default=256, description="Number of token ids.")
    max_seq_len: Size = Field(default=256, description="Longest sequence in tokens.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Dropout probability."
    )
    num_kv_heads: Size | None = Field(
        default=None,
        description="Key/value heads of grouped-query attention; divides num_heads. "
        "Without it, as many as num_heads.",
    )
    tie_embeddings: bool = Field(
        default=True, description="Share the weights of the embedding and the output."
    )
    embedding_norm: bool = Field(
        default=False, description="Normalise the embeddings before the first block."
    )
    logits_soft_cap: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None,
        description="Bound of the logits, c * tanh(logits / c); without it they are not bounded.",
    )
    attention_name: Name = Field(KINDS["attention"].default, description="Provider of attention.")
    attention_pattern: Names | None = Field(
        default=None,
        description="Attention providers repeated over the layers, in place of attention_name.",
    )
    ffn_name: Name = Field(KINDS["ffn"].default, description="Provider of the feed-forward.")
    norm_name: Name = Field(KINDS["norm"].default, description="Provider of the norm.")
    position_name: Name = Field(
        KINDS["position"].default, description="Provider of the positions, or none."
    )
    backbone_name: Name = Field(KINDS["backbone"].default, description="Provider of the backbone.")
    tva: TVASettings = Field(default_factory=TVASettings, description="Settings of tva_default.")
    mha: MHASettings = Field(default_factory=MHASettings, description="Settings of mha.")
    vft: VFTSettings = Field(default_factory=VFTSettings, description="Settings of vft.")
    norm: NormSettings = Field(
        default_factory=NormSettings, description="Settings of rmsnorm and layernorm."
    )
    rope: RoPESettings = Field(default_factory=RoPESettings, description="Settings of rope.")
    ngram: NgramSettings | None = Field(
        default=None, description="Add embeddings of hashed n-grams; without it there are none."
    )

    @property
    def attention_names(self) -> tuple[str, ...]:
        """The attention providers of the first layers; the others repeat them."""
        return self.attention_pattern or (self.attention_name,)


class TrainingSection(Section):
    """``training``: the loop, the optimizer and checkpoints."""

    batch_size: Size = Field(default=16, description="Sequences per micro-batch.")
    max_epochs: Size = Field(default=10, description="Passes over the training data.")
    max_steps: Count | None = Field(
        default=None, description="Stop after this many optimizer steps, if that comes earlier."
    )
    max_tokens: Count | None = Field(
        default=None,
        description="Stop after sequences of this many tokens, if that comes earlier; prompts "
        "and padding count.",
    )
    max_seconds: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        default=None,
        description="Stop, with a checkpoint, when the run has taken this long; a resume has as "
        "much time again.",
    )
    early_stopping_patience: Count | None = Field(
        default=None,
        description="Stop after this many evaluations in a row without a new best loss.",
    )
    early_stopping_min_delta: Annotated[float, Field(ge=0, le=1e3)] = Field(
        default=0.0, description="By how many nats per token a new best loss must be lower."
    )
    grad_accum_steps: Size = Field(
        default=1, description="Micro-batches whose gradients make one optimizer step."
    )
    learning_rate: Annotated[float, Field(gt=0, le=1e3)] = Field(
        default=1e-4, description="Peak learning rate, for a model 1536 wide: see the next key."
    )
    scale_lr_by_width: bool = Field(
        default=True,
        description="Scale the learning rate of matrices that read the residual stream by "
        "1536 / d_model, so that one rate suits every width; false: the same rate for all.",
    )
    min_lr_ratio: Fraction = Field(
        default=0.0, description="Final learning rate as a share of the peak."
    )
    warmup_steps: CountOrZero = Field(
        default=50, description="Steps over which the learning rate rises."
    )
    decay_ratio: Fraction = Field(
        default=DECAY_RATIO, description="Share of the steps, the last ones, over which wsd decays."
    )
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = Field(
        default=0.01, description="Decoupled weight decay."
    )
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Strict(False),
    ] = Field(default=ADAM_BETAS, description="Decay of Adam's two moments.")
    eps: Annotated[float, Field(gt=0, le=1)] = Field(
        default=ADAM_EPS, description="Adam's epsilon."
    )
    gradient_clip: Annotated[float, Field(ge=0, le=1e9)] = Field(
        default=1.0, description="Largest norm of the gradient; 0 does not clip."
    )
    optimizer_name: Name = Field(
        KINDS["optimizer"].default, description="Provider of the optimizer."
    )
    lr_schedule_name: Name = Field(
        KINDS["lr_schedule"].default, description="Provider of the learning-rate schedule."
    )
    muon: MuonSettings = Field(default_factory=MuonSettings, description="Settings of muon.")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Decay of an exponential moving average of the weights, with which the run "
        "evaluates and samples; without it there is none.",
    )
    mixed_precision: Annotated[Literal[True, False, "auto"], one_of(True, False, "auto")] = Field(
        default="auto", description="bf16 autocast: true, false, or auto (where it is faster)."
    )
    amp_level: Name | None = Field(
        default=None, description="Level of the former apex autocast; has no effect."
    )
    compile: Annotated[Literal[True, False, "auto"], one_of(True, False, "auto")] = Field(
        default="auto",
        description="Compile the forward and the loss with torch.compile: true, false, or auto "
        "(on a GPU, where nothing speaks against it).",
    )
    compile_mode: Literal["auto", "default", "reduce-overhead"] = Field(
        default="auto",
        description="How it is compiled: default, reduce-overhead (with CUDA graphs), or auto "
        "(with graphs where the model is small).",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="Seed of the weights, the data order and dropout."
    )
    deterministic: bool = Field(
        default=False,
        description="Use deterministic kernels only, and fail where there is none.",
    )
    save_freq: CountOrZero = Field(
        default=1, description="Epochs between checkpoints; 0 saves at the end only."
    )
    save_every_steps: Count | None = Field(
        default=None, description="Optimizer steps between further checkpoints."
    )
    keep_last: CountOrZero = Field(
        default=3, description="Number of newest checkpoints to keep; 0 keeps all."
    )
    checkpoint_dir: Name | None = Field(
        default=None,
        description="Where checkpoints are kept when no output folder is given: each run has a "
        "folder PROFILE-TIME of its own in it.",
    )
    log_every_steps: Count = Field(
        default=10, description="Optimizer steps between rows of metrics."
    )
    max_nonfinite_steps: Count = Field(
        default=10,
        description="Non-finite steps in a row after which the run stops, at a log interval.",
    )
    hook_timeout: Annotated[float, Field(ge=0, le=1e7)] = Field(
        default=DEFAULT_HOOK_TIMEOUT,
        description="Seconds after which a plugin that has not returned from a hook is reported "
        "with its stack; it is quarantined when it does, except from hooks that may last. 0 "
        "watches none.",
    )
    background_queue: Count = Field(
        default=1000,
        description="Calls of hooks in the background that may wait, of each plugin. A further one "
        "is dropped, which is told.",
    )
    background_timeout: Annotated[float, Field(ge=0, le=1e7)] = Field(
        default=60.0,
        description="Seconds that the end of a run waits for hooks in the background. What is not "
        "done then is left behind, which is told.",
    )


class EvaluationSection(Section):
    """``evaluation``: what is measured, how often, and the sampled continuation."""

    metrics: Names = Field(default=("perplexity",), description="Names of the metrics.")
    eval_freq: CountOrZero = Field(
        default=100,
        description="Optimizer steps between evaluations; 0 evaluates at epoch ends only.",
    )
    eval_batches: Count = Field(
        default=10,
        description="Held-out stretches that an evaluation of a running training looks at; each "
        "has as many windows as an optimizer step.",
    )
    tasks: Names = Field(
        default=(),
        description="Tasks on which the model is scored at each evaluation: by name, or files "
        "(.yaml).",
    )
    task_items: Count = Field(
        default=100,
        description="The most items of a task that such an evaluation looks at, spread over all.",
    )
    save_best: bool = Field(
        default=False, description="Keep the checkpoint that is the best by best_by."
    )
    best_by: Name = Field(
        default="val_loss",
        description="The figure of evaluations by which a checkpoint is the best, as rows of "
        "metrics call it: val_loss, val_accuracy, val_reasoning_quality, task/NAME/METRIC.",
    )
    sample_tokens: Annotated[int, Field(ge=0, le=2**20)] = Field(
        default=200, description="Length of the continuation shown at the end; 0 shows none."
    )
    sample_prompt: Text = Field(default="The ", description="Beginning of that continuation.")
    sample_temperature: Annotated[float, Field(ge=0, le=100)] = Field(
        default=0.8, description="Its temperature; 0 takes the most likely token."
    )


class WandbSection(Section):
    """``monitoring.wandb``."""

    enabled: bool = Field(default=False, description="Log to Weights & Biases.")
    project: Name | None = Field(default=None, description="Project to log to.")
    tags: Names = Field(default=(), description="Tags of the run.")


class TensorboardSection(Section):
    """``monitoring.tensorboard``."""

    enabled: bool = Field(default=False, description="Log to TensorBoard.")
    log_dir: Name | None = Field(default=None, description="Folder of the event files.")


class MonitoringSection(Section):
    """``monitoring``: experiment trackers."""

    wandb: WandbSection = Field(default_factory=WandbSection, description="Weights & Biases.")
    tensorboard: TensorboardSection = Field(
        default_factory=TensorboardSection, description="TensorBoard."
    )


class HardwareSection(Section):
    """``hardware``: where the run takes place."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$")] = Field(
        default="auto", description="auto, cpu, mps, cuda or cuda:N."
    )
    tf32: bool = Field(
        default=True,
        description="Let a GPU multiply fp32 matrices in TF32, several times as fast with 10 bits "
        "of mantissa; false: exactly.",
    )
    num_threads: Annotated[int, Field(ge=1, le=2**10)] | None = Field(
        default=None,
        description="Threads of a CPU run. Without it one for tiny models, for which threads that "
        "wait for each other cost more than they bring; else as many as torch takes.",
    )
    num_gpus: Annotated[int, Field(ge=0, le=2**20)] = Field(
        default=0,
        description="With distributed, the number of processes that apt-train starts, one a GPU.",
    )
    distributed: Annotated[
        Literal[True, False, "ddp", "fsdp"], one_of(True, False, "ddp", "fsdp")
    ] = Field(
        default=False,
        description="Train in several processes: ddp (also: true) copies the model to each, fsdp "
        "shards it.",
    )
    backend: Literal["nccl", "gloo", "mpi"] | None = Field(
        default=None, description="Communication between processes."
    )


class DebugSection(Section):
    """``debug``: what is shown and checked."""

    verbose: bool = Field(
        default=False, description="List the parameters of the model, at the level DEBUG."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field(
        default="INFO", description="Least severity that is logged."
    )
    profile_memory: bool = Field(
        default=False,
        description="Add the memory of weights, gradients, optimizer and averages to the rows of "
        "metrics.",
    )
    check_gradients: bool = Field(
        default=False,
        description="Name parameters whose gradients are not finite; reads them every step.",
    )


class Config(Section):
    """A validated profile, immutable. Sections of plugins are reached by :meth:`section`."""

    name: Text = Field(default="unnamed", description="Name of the profile.")
    version: Text = Field(default="", description="Version of the profile.")
    description: Text = Field(default="", description="What the profile is for.")
    plugins: Annotated[tuple[PluginEntry, ...], Strict(False), Field(max_length=MAX_PLUGINS)] = (
        Field(default=(), description="Plugins that the run activates.")
    )
    model: ModelSection = Field(default_factory=ModelSection, description="The network.")
    training: TrainingSection = Field(default_factory=TrainingSection, description="The loop.")
    schedules: dict[str, ScheduleEntry] = Field(
        default_factory=dict,
        description="enable_PLUGIN_at_epoch|step|token, disable_…, and values of parameters.",
    )
    data: DataSection = Field(default_factory=DataSection, description="The text.")
    evaluation: EvaluationSection = Field(
        default_factory=EvaluationSection, description="Measuring."
    )
    monitoring: MonitoringSection = Field(
        default_factory=MonitoringSection, description="Trackers."
    )
    hardware: HardwareSection = Field(default_factory=HardwareSection, description="The machine.")
    debug: DebugSection = Field(default_factory=DebugSection, description="Diagnosis.")

    _plugin_sections: dict[str, BaseModel] = PrivateAttr(default_factory=dict)

    def with_plugin_sections(self, sections: Mapping[str, BaseModel]) -> Config:
        """A copy that holds these sections of plugins, by dotted path."""
        updated = self
        for path, section in sections.items():
            updated = _replace_placeholder(updated, path.split("."), section)
        config = updated.model_copy()
        config._plugin_sections = {**self._plugin_sections, **sections}
        return config

    @property
    def max_epochs(self) -> int:
        """The epochs of the run; one that begins before its data is built has a single one."""
        return 1 if self.data.begin_early else self.training.max_epochs

    @property
    def seq_len(self) -> int:
        """The tokens of a training sequence."""
        return self.data.max_length or self.model.max_seq_len

    def section(self, path: str) -> BaseModel | None:
        """The section at a dotted path (``"model.moe"``), a plugin's or the core's, or None."""
        if path in self._plugin_sections:
            return self._plugin_sections[path]
        value: Any = self
        for key in path.split("."):
            if not isinstance(value, BaseModel) or key not in type(value).model_fields:
                return None
            value = getattr(value, key)
        return value if isinstance(value, BaseModel) else None

    def to_dict(self, *, secrets: bool = False) -> dict[str, Any]:
        """The resolved profile as plain data, sections of plugins included; with masks in the place
        of its secrets unless ``secrets`` are asked for."""
        data: dict[str, Any] = self._without_plugins().model_dump(mode="json")
        # The outer first: a section may stand within another one.
        for path, section in sorted(self._plugin_sections.items()):
            *parents, last = path.split(".")
            place = data
            for key in parents:
                place = place.setdefault(key, {})
            place[last] = dump(section, secrets=secrets, by_alias=True)
        if secrets:
            return data
        masked: dict[str, Any] = without_secrets(data)
        return masked

    def values(self, paths: Iterable[Sequence[str]]) -> dict[str, Any]:
        """The values of keys as :meth:`to_dict` has them, by dotted key; None where there is no
        such key."""
        data, found = self.to_dict(), {}
        for path in paths:
            value: Any = data
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            found[".".join(path)] = value
        return found

    def plugin_settings(self) -> dict[str, Any]:
        """The sections of plugins as :meth:`to_dict` has them, by dotted path."""
        return self.values(path.split(".") for path in sorted(self._plugin_sections))

    def to_yaml(self) -> str:
        """The resolved profile as YAML text, with masks in the place of its secrets; reading one
        without any gives an equal Config."""
        return yaml_of(self.to_dict())

    def _without_plugins(self) -> Config:
        """A copy with the core's placeholders back, which its serializer knows."""
        config = self
        for path in self._plugin_sections:
            config = _replace_placeholder(config, path.split("."), None)
        return config


def _replace_placeholder(config: Any, path: Sequence[str], section: BaseModel | None) -> Any:
    """Put ``section`` where the core has a field at ``path``; elsewhere return ``config``."""
    key, rest = path[0], path[1:]
    if not isinstance(config, BaseModel) or key not in type(config).model_fields:
        return config
    value = _replace_placeholder(getattr(config, key), rest, section) if rest else section
    return config.model_copy(update={key: value})


PLACEHOLDERS = frozenset({"monitoring.wandb", "monitoring.tensorboard"})
"""Sections that the core only keeps for the plugins that own them."""
