"""Makes the run of a folder of Hugging Face."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt_core.config import Override, Source, read_profile
from apt_core.data.loading import batch_plan, load_data
from apt_core.data.tokenizers.hf import HFTokenizer
from apt_core.errors import ConfigError, Interrupted, Problem
from apt_core.files import flush, write_atomically
from apt_core.json_files import read_json, without_nan
from apt_core.kernel import Kernel, boot
from apt_core.modeling.calling import forward_batch
from apt_core.modeling.costs import layers_of
from apt_core.modeling.modes import eval_mode
from apt_core.runs.folder import now, versions
from apt_core.runs.layout import CHECKPOINTS, TOKENIZER
from apt_core.training import Trainer
from apt_core.training.run import RunResult
from apt_plugins.hf_import.filling import fill, named_as_ours
from apt_plugins.hf_import.hf_config import CONFIG, HFModel, leaves, read_model
from apt_plugins.hf_import.hf_weights import HFWeights
from apt_plugins.hf_import.to_tva import MINIMISED, Heads, of_layers

RECORD = "import.json"
STAGING = ".importing"
STOP = "the model was imported"
CONTEXT = "model.max_seq_len"
"""The key of the model that the command line may set: all others are the folder's."""

WINDOW, VAL_CHARS = 512, 20_000
"""The longest training sequence of a run whose profile does not say one: contexts of models are
long, and texts to begin with short. The characters that are held out where there is no profile:
large models take minutes for more."""

SAMPLE_TOKENS = 2**15
"""The tokens at least by which the inputs of attention are known, where there are so many."""

Told = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What is to be made of ``folder``: a run in ``output`` with the data and the training of
    ``profile``, by default of none but defaults. ``tokenizer`` is one that is not in the folder,
    ``rank`` that of TVA, if the attention is to become that, and ``heal_steps`` how long it then
    trains."""

    folder: Path
    output: Path
    profile: str = ""
    plugins: Sequence[str] = ()
    overrides: Sequence[Override] = ()
    tokenizer: Path | None = None
    rank: int | None = None
    heal_steps: int = 0


@dataclass
class Imported:
    """What became of it. The losses are nats per token on the held-out text of the run."""

    run: Path
    architecture: str
    notes: list[str]
    parameters: int = 0
    loss: float = nan
    to_tva: dict[str, Any] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """What the run keeps of it: ``loss`` is that of the folder's model."""
        kept: dict[str, Any] = {"loss": self.loss}
        return {**kept, "to_tva": self.to_tva} if self.to_tva else kept


def import_folder(asked: Asked, told: Told) -> Imported:
    """Make the run. ``told`` is called with what happens.

    Raises ConfigError with everything that stands against it, and what training raises; no run is
    left behind then, except where healing fails: that run is whole, at an earlier step.
    """
    _require_free(asked.output)
    model, weights, tokenizer, kernel = _read(asked)
    notes = [*model.notes, *weights.notes]
    for note in notes:
        told(f"note: {note}")
    source = {
        "source": str(asked.folder),
        "architecture": model.architecture,
        "imported": now(),
        "versions": versions(),
        "files": weights.sha256(),
        "notes": notes,
    }
    imported = Imported(asked.output, model.architecture, notes)
    with _staging(asked.output, tokenizer) as run:
        told(f"reading {model.architecture} in {asked.folder}")
        made = _made(kernel, run, lambda built: fill(built, named_as_ours(model, weights)))
        imported.parameters, imported.loss = made.parameters, made.loss
        if asked.rank is not None:
            moments = _moments(kernel, made.trainer)
            del made, kernel  # two models at once would need the memory of both
            shutil.rmtree(run)
            told(f"attention becomes TVA of rank {asked.rank}")
            _convert(asked, model, weights, moments, run, imported)
        _settle(run, asked.output, source | imported.figures())
    if asked.heal_steps:
        told(f"training {asked.heal_steps} steps")
        try:
            _heal(asked, model, imported)
        finally:
            _record(asked.output, source | imported.figures())
    return imported


def _require_free(output: Path) -> None:
    if (output / STAGING).exists():
        message = "an import into it is going on, or was killed"
        raise ConfigError(message, "--output", str(output), "delete it if none is")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError("is in use", "--output", str(output), "name a folder that is not there")


def _read(asked: Asked) -> tuple[HFModel, HFWeights, HFTokenizer, Kernel]:
    """The model, its tensors, its tokenizer and the run's profile. Raises ConfigError with all
    problems."""
    if not asked.folder.is_dir():
        what = "is a file" if asked.folder.exists() else "does not exist"
        raise ConfigError(f"{what}: give the folder of a model", "DIR", str(asked.folder))
    problems: list[Problem] = []
    tokenizer, model, weights, kernel = None, None, None, None
    try:
        tokenizer = _tokenizer(asked)
    except ConfigError as error:
        problems += error.problems
    try:
        model = read_model(asked.folder, _context(asked))
        problems += _of_rank(asked, model)
        weights = HFWeights(asked.folder, model)
    except ConfigError as error:
        problems += error.problems
    if model is not None:
        try:
            kernel = _kernel(asked, model)
        except ConfigError as error:
            problems += error.problems
    if model is not None and tokenizer is not None:
        ids, rows = tokenizer.vocab_size, model.keys["vocab_size"]
        if ids > rows:
            message = f"is {rows:,}, and the tokenizer has {ids:,} ids"
            hint = "--tokenizer PATH names another tokenizer"
            where = str(asked.folder / CONFIG)
            problems.append(Problem(message, "vocab_size", where, hint))
    if problems or model is None or weights is None or tokenizer is None or kernel is None:
        raise ConfigError(problems)
    return model, weights, tokenizer, kernel


def _tokenizer(asked: Asked) -> HFTokenizer:
    """The tokenizer of the folder, or that which was named. Raises ConfigError for one that is not
    there or cannot be read."""
    place, key = asked.tokenizer or asked.folder, "--tokenizer" if asked.tokenizer else "DIR"
    file = place / "tokenizer.json" if place.is_dir() else place
    if not file.is_file():
        hint = "--tokenizer PATH names a tokenizer.json, or a folder with one"
        message = f"there is no {file.name} in it" if place.is_dir() else "there is no such file"
        raise ConfigError(message, key, str(place), hint)
    tokenizer = HFTokenizer({"path": str(place)})
    try:
        _ = tokenizer.vocab_size, tokenizer.special, tokenizer.chat_template
    except ConfigError as error:
        found = [replace(each, key=key, where=str(file)) for each in error.problems]
        raise ConfigError(found) from error
    except ValueError as error:
        raise ConfigError(f"the tokenizer cannot be read: {error}", key, str(file)) from error
    return tokenizer


def _of_rank(asked: Asked, model: HFModel) -> Iterator[Problem]:
    if asked.rank is None:
        return
    d_model, heads = model.keys["d_model"], model.keys["num_heads"]
    most = min(model.head_dim, d_model // heads)
    if d_model % heads:
        message = f"TVA's heads divide the width, and {heads} do not divide {d_model}"
        yield Problem(message, "--to-tva")
    elif asked.rank % 2 or not 2 <= asked.rank <= most:
        hint = f"choose an even rank from 2 to {most}"
        yield Problem(f"{asked.rank} is no rank of these heads", "--to-tva", "", hint)


# The profile -------------------------------------------------------------------------------------


def _source(asked: Asked) -> Source:
    if asked.profile:
        return read_profile(asked.profile, asked.overrides)
    return Source.from_dict({"name": asked.folder.name or "imported"}).with_overrides(
        asked.overrides
    )


def _context(asked: Asked) -> int | None:
    """The context that the command line asks for; what is none is refused later."""
    source = _source(asked)
    found = source.get(CONTEXT) if _is_asked(source, CONTEXT) else None
    return found if type(found) is int and found > 0 else None


def _is_asked(source: Source, key: str) -> bool:
    """Whether the command line has set a key."""
    return source.has(key) and source.where(key).startswith("--")


def _kernel(asked: Asked, model: HFModel, rank: int | None = None) -> Kernel:
    """The profile with the folder's model; with a ``rank`` its attention is TVA."""
    source = _source(asked)
    keys = dict(model.keys)
    if rank is not None:
        mha = keys.pop("mha")
        keys["attention_name"] = "tva_default"
        keys["tva"] = {**{k: v for k, v in mha.items() if k != "head_dim"}, "rank": rank}
    keys |= {name: None for name in ("attention_pattern", "logits_soft_cap", "ngram")}
    keys |= {
        "embedding_norm": False,
        "ffn_name": "default",
        "norm_name": "rmsnorm",
        "position_name": "rope",
        "backbone_name": "gpt",
    }
    values: dict[tuple[str, ...], Any] = {}
    for path in leaves(keys):
        value: Any = keys
        for key in path:
            value = value[key]
        values["model", *path] = value
    problems = [
        Problem(
            f"is {source.get(path)!r}, and the imported model has {value!r}",
            ".".join(path),
            source.where(path),
            "leave it out: the model is the folder's",
        )
        for path, value in sorted(values.items())
        if _is_asked(source, ".".join(path)) and source.get(path) != value
    ]
    if problems:
        raise ConfigError(problems)
    values["data", "tokenizer_name"] = "hf"
    values["data", "tokenizer", "path"] = str(asked.output / TOKENIZER)
    if source.get("data.max_length") is None:
        values["data", "max_length"] = min(WINDOW, keys["max_seq_len"])
    if not asked.profile and source.get("data.max_val_chars") is None:
        values["data", "max_val_chars"] = VAL_CHARS
    where = str(asked.folder / CONFIG)
    added = [Override(path, value, where) for path, value in values.items()]
    return boot(source, plugins=asked.plugins, overrides=added)


# The run -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    trainer: Trainer
    result: RunResult

    @property
    def parameters(self) -> int:
        return self.trainer.trained.num_parameters

    @property
    def loss(self) -> float:
        return self.result.figures.get("val_loss", float("nan"))


def _made(kernel: Kernel, folder: Path, weights: Callable[[nn.Module], None]) -> _Made:
    """A run in ``folder`` that stops before its first step."""
    trainer = Trainer(kernel, output=folder, weights=weights)
    trainer.request_stop(STOP)
    result = trainer.fit()
    if result.exit_code:
        raise Interrupted(result.exit_code - 128)
    return _Made(trainer, result)


@contextmanager
def _staging(output: Path, tokenizer: HFTokenizer) -> Iterator[Path]:
    """Where the run is made: a folder in ``output``, which has the tokenizer meanwhile and is
    empty, or gone, after an error."""
    existed = output.exists()
    staging = output / STAGING
    try:
        staging.mkdir(parents=True)
        (output / TOKENIZER).mkdir()
        tokenizer.save(output / TOKENIZER)
        yield staging / "run"
    except BaseException as error:
        shutil.rmtree(output, ignore_errors=True)
        if existed:
            output.mkdir(exist_ok=True)
        if isinstance(error, OSError):
            where = str(error.filename or output)
            message = f"the run cannot be written: {error.strerror or error}"
            raise ConfigError(message, "--output", where) from error
        raise
    shutil.rmtree(staging)


def _settle(run: Path, output: Path, record: Mapping[str, Any]) -> None:
    """Put the run where it belongs. Its checkpoints come first: with them it is a run, whatever
    else is there."""
    path = run / "manifest.json"
    manifest = read_json(path)
    manifest["checkpoint_dir"] = os.path.join(os.path.realpath(output), CHECKPOINTS)
    write_atomically(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    _record(run, record)
    shutil.rmtree(output / TOKENIZER)
    (run / TOKENIZER).rename(output / TOKENIZER)
    (run / CHECKPOINTS).rename(output / CHECKPOINTS)
    for each in sorted(run.iterdir()):
        each.rename(output / each.name)
    flush(output)


def _record(run: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(without_nan(record), indent=2, ensure_ascii=False)
    write_atomically(run / RECORD, text + "\n")


# TVA ---------------------------------------------------------------------------------------------


def _convert(
    asked: Asked,
    model: HFModel,
    weights: HFWeights,
    moments: Sequence[Tensor],
    run: Path,
    imported: Imported,
) -> None:
    """Make the run with TVA in place of the folder's attention."""
    assert asked.rank is not None
    kernel = _kernel(asked, model, asked.rank)
    config = kernel.config
    heads = Heads(
        config.model.num_heads,
        config.model.num_kv_heads or config.model.num_heads,
        model.head_dim,
        config.model.rope,
        config.seq_len,
    )
    lost: list[dict[str, float]] = []
    tensors = of_layers(
        named_as_ours(model, weights),
        moments,
        heads,
        asked.rank,
        width=config.model.d_model // config.model.num_heads,
        seed=config.training.seed,
        lost=lost,
    )
    made = _made(kernel, run, lambda built: fill(built, tensors))
    imported.parameters = made.parameters
    imported.to_tva = {
        "rank": asked.rank,
        "head_dim": model.head_dim,
        "minimised": MINIMISED,
        "lost": lost,
        "loss_before": imported.loss,
        "loss_after": made.loss,
    }


@torch.no_grad()
def _moments(kernel: Kernel, trainer: Trainer) -> list[Tensor]:
    """E[x xᵀ] [D, D] of what each attention reads, over the first training windows of the run."""
    sums = [torch.zeros(()) for _ in layers_of(trainer.model)]
    count, tokens = 0, torch.zeros(())

    def note(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0][tokens].float()
            sums[layer] = sums[layer].to(rows.device) + rows.T @ rows

        return hook

    data = load_data(kernel)
    attentions = [block.attention for block in layers_of(trainer.model)]
    handles = [each.register_forward_pre_hook(note(n)) for n, each in enumerate(attentions)]
    try:
        plan = batch_plan(kernel, data, 0, 1)
        with closing(plan), eval_mode(trainer.model):
            for index in range(plan.steps_per_epoch):
                for batch in plan.step(1, index)[0]:
                    moved = batch.to(trainer.device)
                    tokens = moved.token_mask()
                    forward_batch(trainer.model, trainer.model, moved)
                    count += moved.token_count
                if count >= SAMPLE_TOKENS:
                    break
    finally:
        for handle in handles:
            handle.remove()
        data.close()
    return [(each / count).cpu() for each in sums]


def _heal(asked: Asked, model: HFModel, imported: Imported) -> None:
    """Take the first steps of the run: what was lost is learned again."""
    kernel = _kernel(asked, model, asked.rank)
    trainer = Trainer(kernel, output=asked.output, resume=True, stop_at_step=asked.heal_steps)
    result = trainer.fit()
    imported.to_tva |= {
        "heal_steps": result.step,
        "loss_healed": result.figures.get("val_loss", nan),
    }
    if result.exit_code:
        raise Interrupted(result.exit_code - 128)
