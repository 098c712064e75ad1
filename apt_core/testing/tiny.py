"""A whole training run in about a second, and a model to generate with, for tests of plugins."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_core.config import Override
from apt_core.json_files import read_json
from apt_core.plugin_manager import PluginManager
from apt_core.testing.own_modules import own_modules

if TYPE_CHECKING:
    from torch import Tensor

    from apt_core.runs import Session
    from apt_core.training import RunResult

TINY_PROFILE: dict[str, Any] = {
    "name": "tiny_run",
    "model": {
        "d_model": 16,
        "num_heads": 2,
        "num_layers": 1,
        "d_ff": 32,
        "vocab_size": 256,
        "max_seq_len": 16,
    },
    "training": {
        "batch_size": 4,
        "max_epochs": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "log_every_steps": 2,
        "mixed_precision": False,
        "compile": False,
    },
    "evaluation": {"eval_freq": 4, "eval_batches": 2, "sample_tokens": 4},
    "hardware": {"device": "cpu"},
}
"""A profile of a few thousand parameters that trains a dozen steps an epoch."""

TEXT = "\n\n".join(
    f"Line {n} of a small text: {n} apples and {n + 1} pears make {2 * n + 1} pieces of fruit."
    for n in range(12)
)


@dataclass
class TinyRun:
    """The results of a tiny run: ``weights`` by parameter name, rows of ``metrics.jsonl``, the
    ``manifest``, and the manager with its records."""

    result: RunResult
    weights: dict[str, Tensor]
    metrics: list[dict[str, Any]]
    manifest: dict[str, Any]
    manager: PluginManager

    def same_weights(self, other: TinyRun) -> bool:
        """Whether all weights are bit-identical."""
        return self.weights.keys() == other.weights.keys() and all(
            tensor.equal(other.weights[name]) for name, tensor in self.weights.items()
        )


def _manager(plugins: Iterable[Any], *, strict: bool) -> tuple[PluginManager, list[str]]:
    """A manager that has the ``plugins`` that are objects, and the references among them."""
    manager = PluginManager(strict=strict)
    references = [os.fspath(p) for p in plugins if isinstance(p, str | os.PathLike)]
    for plugin in plugins:
        if not isinstance(plugin, str | os.PathLike):
            manager.register(plugin)
    return manager, references


def _overrides(keys: Mapping[str, Any] | None) -> list[Override]:
    return [Override(tuple(k.split(".")), v, k) for k, v in (keys or {}).items()]


def tiny_session(
    *plugins: Any,
    strict: bool = True,
    profile: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Session:
    """A session of an untrained tiny model, for tests of generation hooks; arguments as for
    :func:`tiny_run`."""
    from apt_core.data.loading import load_tokenizer
    from apt_core.kernel import boot
    from apt_core.modeling.compose import ModelBuilder
    from apt_core.modeling.placement import settle_device
    from apt_core.runs import Position, Session

    manager, references = _manager(plugins, strict=strict)
    kernel = boot(
        copy.deepcopy(dict(profile if profile is not None else TINY_PROFILE)),
        plugins=references,
        overrides=_overrides(overrides),
        manager=manager,
        files=False,
    )
    device = settle_device(kernel)
    return Session(
        config=kernel.config,
        manager=manager,
        registry=kernel.registry,
        schedule=kernel.schedule,
        position=Position(),
        model=ModelBuilder(kernel.config, kernel.registry).build_model().to(device),
        tokenizer=load_tokenizer(kernel),
        device=device,
    )


def tiny_run(
    *plugins: Any,
    steps: int | None = None,
    strict: bool = True,
    profile: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    output: str | os.PathLike[str] | None = None,
    **options: Any,
) -> TinyRun:
    """Train a tiny model with the given plugins (objects, or references as ``--plugin`` takes).

    ``steps`` ends the run early; ``strict`` makes a plugin's failure raise; ``profile`` replaces
    TINY_PROFILE and ``overrides`` sets dotted keys of it. ``options``, such as ``resume=True``, go
    to the Trainer. Without ``output`` the run's folder is temporary.

    A resumed run imports plugins given as references anew, with their packages, as a new process
    would, so that state in modules is lost. Plugins given as objects keep their state.
    """
    from apt_core.kernel import boot
    from apt_core.training import Trainer

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(output) if output else Path(temporary) / "run"
        data = copy.deepcopy(dict(profile if profile is not None else TINY_PROFILE))
        if not data.get("data"):
            # Beside the run's folder, so that a run which resumes it reads the same file.
            text = folder.with_name(f"{folder.name}.txt")
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(TEXT, encoding="utf-8")
            data["data"] = {"train_path": str(text)}
        changes = _overrides(overrides)
        if steps is not None:
            changes.append(Override(("training", "max_steps"), steps, "steps"))
        manager, references = _manager(plugins, strict=strict)
        resumes = bool(options.get("resume") or options.get("resume_from"))
        with own_modules(references, anew=resumes):
            kernel = boot(
                data,
                plugins=references,
                overrides=changes,
                manager=manager,
                strict=strict,
            )
            trainer = Trainer(kernel, output=folder, **options)
            result = trainer.fit()
        rows = folder / "metrics.jsonl"  # a run that ends before its first row has none
        written = rows.is_file() and not rows.is_symlink()
        lines = rows.read_text(encoding="utf-8").splitlines() if written else []
        return TinyRun(
            result=result,
            weights={
                name: parameter.detach().clone()
                for name, parameter in trainer.model.named_parameters()
            },
            metrics=[json.loads(line) for line in lines],
            manifest=read_json(folder / "manifest.json")
            if (folder / "manifest.json").is_file()
            else {},
            manager=manager,
        )
