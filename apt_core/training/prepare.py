"""Everything a run needs before its first step: text, model, optimizer, learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.optim import Optimizer

from apt_core.config import Config, inactive_alone
from apt_core.data.batches import BatchPlan
from apt_core.data.tokens import ids_sha256, tokenize
from apt_core.device import autocast_dtype, forget_peak_memory, resolve_device, unused_gpu
from apt_core.errors import ConfigError, Problem, ProviderError
from apt_core.kernel import Kernel, before_the_run
from apt_core.log import get_logger
from apt_core.modeling.compose import ModelBuilder
from apt_core.modeling.lr_scale import learning_rate_scales, undeclared_squares
from apt_core.modeling.probe import probe_layer
from apt_core.paths import READ
from apt_core.providers.dataset import DatasetProvider, TextData
from apt_core.providers.lr_schedule import LRScheduleProvider
from apt_core.providers.optimizer import OptimizerProvider
from apt_core.providers.tokenizer import TokenizerProvider
from apt_core.training.blame import naming_authors
from apt_core.training.compiling import Forward, compilation
from apt_core.training.costs import support_notices
from apt_core.training.distributed import ALONE, World
from apt_core.training.gathering import gathered_dtype
from apt_core.training.parameter_groups import parameter_groups
from apt_core.training.peak import measured_peak_flops
from apt_core.training.rehearsal import rehearse
from apt_core.training.run_folder import versions
from apt_core.training.run_length import horizon, tell_what_the_length_decides
from apt_core.training.seeds import fp32_products
from apt_core.training.state import keep_plan

log = get_logger("apt.training")

PROBED = ("attention", "ffn", "norm")

ONE_THREAD_BELOW = 2**23
"""Multiply-adds of one feed-forward matrix in a micro-batch, below which a second thread brings a
quarter on an idle machine and costs a multiple on a busy one."""


def num_threads(config: Config) -> int | None:
    """How many CPU threads the run takes, or None for torch's choice: a function of the profile,
    since results depend on it in their last bits."""
    if config.hardware.num_threads is not None:
        return config.hardware.num_threads
    model, length = config.model, config.seq_len
    work = config.training.batch_size * length * model.d_model * model.d_ff
    return 1 if work < ONE_THREAD_BELOW else None


@dataclass
class Parts:
    """The parts of a run. ``forward`` computes the model, compiled or not."""

    device: torch.device
    dtype: torch.dtype | None
    tokenizer: TokenizerProvider
    plan: BatchPlan
    val_tokens: npt.NDArray[Any]
    bytes_per_token: float
    data: dict[str, Any]
    model: nn.Module
    forward: Forward
    optimizer: Optimizer
    lr_schedule: LRScheduleProvider


def prepare(kernel: Kernel, device: torch.device, world: World = ALONE) -> Parts:
    """Build the parts. Raises ConfigError for input that does not fit together, and what a
    plugin's part raises as an error that names the plugin."""
    with before_the_run(), naming_authors(kernel):
        return _prepare(kernel, device, world)


def _prepare(kernel: Kernel, device: torch.device, world: World) -> Parts:
    config, registry = kernel.config, kernel.registry
    training = config.training
    if world.size == 1:
        _note_what_needs_others(kernel)
    dtype = autocast_dtype(training.mixed_precision, device, config.model.d_model)
    # Before the model takes its memory.
    measured_peak_flops(device, dtype or torch.float32)
    forget_peak_memory(device)  # that of the measurement, and of runs before this one
    tokenizer, plan, val_tokens, bytes_per_token, data = _data(kernel, world)
    schedule = kernel.schedule.with_horizon(horizon(config, plan))
    lr_schedule = registry.get("lr_schedule", training.lr_schedule_name)
    tell_what_the_length_decides(kernel, schedule, lr_schedule)
    with fp32_products(device, tf32=False):
        rehearse(kernel, schedule)
    model = ModelBuilder(config, registry).build_model()
    world.shard(model, device, gathered_dtype(kernel, model, device, dtype, world))
    model.to(device)
    kernel.notices += support_notices(kernel, device)
    optimizer = build_optimizer(kernel, model)
    _note_roles_that_are_not_told(kernel, model)
    world.require_alike(_what_decides(kernel, dtype, data))
    return Parts(
        device=device,
        dtype=dtype,
        tokenizer=tokenizer,
        plan=plan,
        val_tokens=val_tokens,
        bytes_per_token=bytes_per_token,
        data=data,
        model=model,
        forward=loop_forward(kernel, model, device, world),
        optimizer=optimizer,
        lr_schedule=lr_schedule,
    )


def build_optimizer(kernel: Kernel, model: nn.Module) -> Optimizer:
    """The profile's optimizer of ``model``, whose groups keep their peak rate as ``initial_lr``."""
    training = kernel.config.training
    provider: OptimizerProvider = kernel.registry.get("optimizer", training.optimizer_name)
    groups = parameter_groups(
        model,
        kernel.manager,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        scales=learning_rate_scales(
            model, kernel.config.model.d_model if training.scale_lr_by_width else None
        ),
        separate_matrices=getattr(provider, "separates_matrices", False),
    )
    optimizer = provider.create(
        groups, learning_rate=training.learning_rate, weight_decay=training.weight_decay
    )
    keep_plan(optimizer)
    return optimizer


def _note_roles_that_are_not_told(kernel: Kernel, model: nn.Module) -> None:
    """The rate of a matrix depends on whether it reads the residual stream, which its sizes do not
    tell where it is square."""
    training, registry = kernel.config.training, kernel.registry
    provider: OptimizerProvider = registry.get("optimizer", training.optimizer_name)
    by_width = training.scale_lr_by_width and not getattr(provider, "separates_matrices", False)
    names = undeclared_squares(model, kernel.config.model.d_model) if by_width else []
    if names:
        more = f" and {len(names) - 1} more" if names[1:] else ""
        kernel.notices.append(
            f"{names[0]}{more}: no layer says whether it reads the residual stream or writes to it "
            "(reads_stream); it learns at the rate of one that writes"
        )


def loop_forward(kernel: Kernel, model: nn.Module, device: torch.device, world: World) -> Forward:
    """What the loop calls: ``model``, the same in every process, compiled or not."""
    world.replicate(model)
    chosen = compilation(kernel, device, world.sharding, world.size)
    return Forward(model, chosen, strict=kernel.manager.strict)


OWN_SECTIONS = ("name", "version", "description", "monitoring", "hardware", "debug")
"""What may differ between the processes of a run, but for what of it decides."""


def _what_decides(
    kernel: Kernel, dtype: torch.dtype | None, data: Mapping[str, Any]
) -> dict[str, Any]:
    """What has to be the same in all the processes of a run."""
    registry, records = kernel.registry, kernel.manager.records
    profile = {k: part for k, part in kernel.config.to_dict().items() if k not in OWN_SECTIONS}
    # What is at the paths counts, and is compared: machines may keep it elsewhere.
    for section, key in (*READ, ("training", "checkpoint_dir")):
        del profile[section][key]
    return {
        **profile,
        "text": {"sha256": data["sha256"]},
        "tokens": data["tokens_sha256"],
        "providers": {row.kind: row.used for row in registry.resolutions.values()},
        "plugins": {
            r.name: f"{r.version} {r.source_sha256}"
            for r in records.values()
            if r.state == "active"
        },
        "precision": str(dtype),
        "tf32": kernel.config.hardware.tf32,
        "versions": versions(),
    }


def _note_what_needs_others(kernel: Kernel) -> None:
    """Keys of distribution do nothing in a run of one process. Raises ConfigError if ``strict``."""
    inactive = inactive_alone(kernel.config)
    if inactive and kernel.manager.strict:
        raise ConfigError([Problem(i.reason, i.key, hint="--strict allows none") for i in inactive])
    kernel.inactive += inactive


def settle_device(kernel: Kernel, world: World = ALONE) -> torch.device:
    """The run's device, on which the registry probes layers from now on.

    Each process on a machine with GPUs has one of its own; a ConfigError says where there are too
    few. A device that is not there is replaced by the CPU, with a notice; under ``strict`` that is
    a ConfigError too.
    """
    asked = kernel.config.hardware.device
    device, reason = resolve_device(asked)
    if reason:
        message = f"hardware.device: {asked} not usable ({reason})"
        if kernel.manager.strict:
            raise ConfigError(Problem(message, hint="--strict allows no fallback"))
        kernel.notices.append(f"{message}: using {device.type}")
    elif asked == "auto" and device.type == "cpu" and (why := unused_gpu()):
        kernel.notices.append(f"using the CPU, though this machine has a GPU: {why}")
    if device.type == "cuda" and world.size > 1:
        device = _own_gpu(asked, world)
    kernel.registry.probe = layer_probe(kernel, device)
    return device


def _own_gpu(asked: str, world: World) -> torch.device:
    """This process's. Of processes that torchrun or --nproc has started, all on the machine raise
    the same ConfigError, or none does."""
    # Whoever starts processes without torchrun may count them by LOCAL_RANK alone.
    processes = max(world.on_this_machine, world.local_rank + 1)
    there = torch.cuda.device_count()
    if ":" in asked and processes > 1:
        message = f"{asked} is one GPU, and {processes} processes on this machine need one each"
        raise ConfigError(
            Problem(message, key="hardware.device", hint="hardware.device: cuda gives each its own")
        )
    if ":" in asked:
        return torch.device(asked)
    if processes > there:
        message = f"{processes} processes on this machine need a GPU each; it has {there}"
        hint = f"--nproc {there} takes what there is, hardware.device: cpu none"
        if there == 1:
            hint += "; processes that each see a GPU of their own need LOCAL_RANK=0"
            hint += " and LOCAL_WORLD_SIZE=1"
        raise ConfigError(Problem(message, key="hardware.device", hint=hint))
    return torch.device("cuda", world.local_rank)


def layer_probe(kernel: Kernel, device: torch.device) -> Any:
    """The registry's probe: one tiny forward and backward of a layer on the run's device."""
    model = kernel.config.model

    def probe(spec: Any, provider: Any, config: Any) -> str | None:
        if spec.kind not in PROBED:
            return None
        position = None
        if spec.kind == "attention" and model.position_name != "none":
            position = kernel.registry.get("position", model.position_name)
        # A plan is made on the meta device; the probe computes something.
        with torch.device("cpu"):
            return probe_layer(
                provider,
                spec.kind,
                device=device,
                head_dim=model.d_model // model.num_heads,
                position=position,
            )

    return probe


def build_tokenizer(kernel: Kernel) -> TokenizerProvider:
    """The profile's tokenizer. Raises ConfigError if the model has fewer ids than it."""
    config = kernel.config
    name = config.data.tokenizer_name
    tokenizer: TokenizerProvider = kernel.registry.get("tokenizer", name)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            Problem(
                f"is {config.model.vocab_size}, but tokenizer {name!r} has "
                f"{tokenizer.vocab_size} ids",
                key="model.vocab_size",
                hint=f"set it to {tokenizer.vocab_size} or more",
            )
        )
    return tokenizer


def load_text(kernel: Kernel) -> TextData:
    """The text of the run. Raises ConfigError for what cannot be read, ProviderError for a dataset
    that loads anything but text."""
    name = kernel.config.data.dataset_name
    provider = kernel.registry.get("dataset", name)
    if isinstance(provider, DatasetProvider):
        provider.data_section = kernel.config.data
    loaded = provider.load()
    if not isinstance(loaded, TextData):
        plugin = kernel.registry.spec("dataset", name).plugin
        raise ProviderError(
            f"dataset:{name} (plugin {plugin}): load() returned a {type(loaded).__name__}, not "
            "TextData"
        )
    return loaded


def _data(
    kernel: Kernel, world: World
) -> tuple[TokenizerProvider, BatchPlan, npt.NDArray[Any], float, dict[str, Any]]:
    config = kernel.config
    tokenizer = build_tokenizer(kernel)
    loaded = load_text(kernel)
    log.info("data: %s", loaded.description)
    tokens = tokenize(tokenizer, loaded.train)
    val_tokens = tokenize(tokenizer, loaded.val)
    plan = BatchPlan(
        tokens,
        seq_len=config.seq_len,
        batch_size=config.training.batch_size,
        grad_accum_steps=config.training.grad_accum_steps,
        seed=config.training.seed,
        rank=world.rank,
        world_size=world.size,
    )
    data = {
        "description": loaded.description,
        "sha256": loaded.sha256,
        "tokens_sha256": {"train": ids_sha256(tokens), "val": ids_sha256(val_tokens)},
        "train_tokens": int(np.size(tokens)),
        "val_tokens": int(np.size(val_tokens)),
    }
    val_bytes = len(loaded.val.encode("utf-8", errors="surrogatepass"))
    return tokenizer, plan, val_tokens, val_bytes / max(1, np.size(val_tokens)), data
