"""Decides whether and how torch.compile is used on a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from apt_core.config import Config
from apt_core.kernel import Kernel
from apt_core.modeling.compose import ModelBuilder
from apt_core.modeling.costs import supported
from apt_core.parallel.world import Sharding

GRAPHS_BELOW = 2**31
"""CUDA graphs are used if the tokens of a micro-batch times d_model² are below this. A compiled
layer launches some 40 kernels in its forward and backward, which takes the host about 0.4 ms, and
computes 72 d_model² FLOPs per token; at 400 TFLOP/s both take equally long at 2**31."""

GRAPHS = "reduce-overhead"


@dataclass(frozen=True)
class Compilation:
    """``mode`` is that of torch.compile, None if nothing is compiled; ``reason`` says why nothing
    is compiled or why there are no CUDA graphs; ``asked`` whether the profile demands this mode."""

    mode: str | None
    reason: str
    asked: bool = False


def compilation(
    kernel: Kernel, device: torch.device, sharding: Sharding, world_size: int
) -> Compilation:
    """Decide ``training.compile`` and ``training.compile_mode`` for ``device``."""
    training = kernel.config.training
    wanted = training.compile_mode
    if training.compile is False:
        return Compilation(None, "training.compile is false", asked=True)
    asked = training.compile is True
    if not asked and (reason := _objection(kernel, device, sharding)):
        return Compilation(None, reason)
    against = _objection_to_graphs(kernel, device, world_size)
    if wanted == "default":
        against = "training.compile_mode is default"
    elif wanted == "auto":
        against = against or _too_large_for_graphs(kernel.config) or _reading_plugins(kernel)
    return Compilation("default" if against else GRAPHS, against, asked)


def computes(
    config: Config, device: torch.device, dtype: torch.dtype | None, chosen: Compilation
) -> dict[str, Any]:
    """Precision, TF32 and compilation of a forward, as plans and manifests show them."""
    return {
        "precision": str(dtype or torch.float32).removeprefix("torch."),
        "tf32": device.type == "cuda" and config.hardware.tf32,
        "compile": {"mode": chosen.mode, "reason": chosen.reason},
    }


def computes_in_words(how: Mapping[str, Any]) -> str:
    """The result of :func:`computes` as a text.

    >>> chosen = {"mode": "default", "reason": "the model is large"}
    >>> computes_in_words({"precision": "bfloat16", "tf32": True, "compile": chosen})
    'computes in bfloat16 (fp32 in TF32), compiled without graphs (the model is large)'
    """
    mode, reason = how["compile"]["mode"], how["compile"]["reason"]
    compiled = {None: "not compiled", "default": "compiled without graphs"}
    tf32 = " (fp32 in TF32)" if how["tf32"] else ""
    why = f" ({reason})" if reason else ""
    words = compiled.get(mode, f"compiled, {mode}")
    return f"computes in {how['precision']}{tf32}, {words}{why}"


def _objection(kernel: Kernel, device: torch.device, sharding: Sharding) -> str:
    """Why ``auto`` does not compile; empty if it does."""
    if device.type != "cuda":
        return "auto compiles on a GPU alone"
    if not _has_triton(device):
        return "auto compiles nothing without Triton, or on a GPU that it does not know"
    if sharding == "fsdp":
        return "auto compiles nothing under fsdp, which gathers parameters in between"
    for name in dict.fromkeys(ModelBuilder(kernel.config, kernel.registry).attention_names()):
        supports = supported(kernel.registry.get("attention", name)) or {}
        if supports.get("compile") is False:
            return f"auto compiles no attention {name}, which does not claim to support it"
    return ""


def _has_triton(device: torch.device) -> bool:
    from torch.utils._triton import has_triton, has_triton_package

    if not has_triton_package():  # a plan may be for a device that is not on this machine
        return False
    with torch.cuda.device(device):
        return bool(has_triton())


def _objection_to_graphs(kernel: Kernel, device: torch.device, world_size: int) -> str:
    if device.type != "cuda":
        return "there are graphs on a GPU alone"
    if world_size > 1:
        return "gradients of several processes are summed in the backward"
    if kernel.config.training.grad_accum_steps > 1:
        return "a graph overwrites the gradients of the micro-batch before (grad_accum_steps)"
    return ""


def _too_large_for_graphs(config: Config) -> str:
    work = config.training.batch_size * config.seq_len * config.model.d_model**2
    return "" if work < GRAPHS_BELOW else "the model is large: starting its kernels takes no time"


def _reading_plugins(kernel: Kernel) -> str:
    """The reason why plugins forbid CUDA graphs, or empty: they may keep a forward's outputs, or
    build layers that do, and a graph overwrites the outputs in the next forward."""
    hook = kernel.manager.hook
    methods = [*readers_of_outputs(hook), *hook.apt_transform_model.get_hookimpls()]
    names = sorted({method.plugin_name for method in methods})
    return f"plugin {names[0]} may keep what graphs overwrite" if names else ""


def readers_of_outputs(hook: Any) -> list[Any]:
    """The implementations of apt_loss_terms that read the model's output, of all plugins of
    ``hook``."""
    return [m for m in hook.apt_loss_terms.get_hookimpls() if "output" in m.argnames]
